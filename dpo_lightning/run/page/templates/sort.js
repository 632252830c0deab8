"use strict";
// Tables are sorted by a click on the head of a column; another click turns the order round.
const parts = (text) => text.replaceAll("−", "-").split(/(-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)/i);
const number = (text) => parseFloat(text.replaceAll(",", ""));
const missing = (text) => text === "" || text === "–";

function compare(one, other) {
  const [a, b] = [parts(one), parts(other)];
  for (let i = 0; i < Math.min(a.length, b.length); i++) {
    const found = i % 2 ? number(a[i]) - number(b[i]) : a[i].localeCompare(b[i]);
    if (found) return found;
  }
  return a.length - b.length;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const [one, other] = [text(a), text(b)];
        // What is missing comes last either way.
        if (missing(one) || missing(other)) return missing(one) - missing(other);
        return down ? compare(other, one) : compare(one, other);
      });
      body.append(...rows);
    });
  });
}
