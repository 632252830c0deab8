"""Settings: their schema, their composition, their mistakes. Imports no torch.

In: the words of a command line, the files of ``conf/``. Out: one checked ``Config`` of plain values
and a folder for it, or one line that says what is wrong.
"""
