"""Places where trials run: processes of this machine, jobs of SLURM, tasks of Ray.

In: trials that wait and what each demands. Out: attempts and how they ended; a trial's folder never
has two writers.
"""
