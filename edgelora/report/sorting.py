"""The page's one script: it makes the headings of tables into buttons that sort. The page is whole without it."""

from __future__ import annotations

import base64
import hashlib

# Cells sort by data-by, the figure behind their text, else by the text; cells without any stay last either way. The rows'
# first order is kept among equals and comes back with the third click.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], first = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = {ascending: "descending", descending: ""}[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (order) head.setAttribute("aria-sort", order);
      const key = (row) => {
        const cell = row.cells[column], text = cell.textContent.trim();
        return cell.dataset.by !== undefined ? Number(cell.dataset.by) : text === "" ? null : text;
      };
      const sign = order === "descending" ? -1 : 1;
      const sorted = order === "" ? first : [...first].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true}));
      });
      body.append(...sorted);
    });
  });
}
"""
HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
