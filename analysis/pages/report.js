"use strict";
/* The moving parts of a report: tables that sort, the map, and folded parts that open to be printed. */
(() => {
  /* A column's head becomes a button; it sorts by the cells' numbers, or by their texts. */
  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table.tBodies[0], column, descending ? -1 : 1);
      });
    });
  }

  function sort(body, column, sign) {
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column];
      return { row, number: cell.dataset.number === undefined ? null : Number(cell.dataset.number), text: cell.textContent };
    });
    keyed.sort((a, b) => {
      if ((a.number === null) !== (b.number === null)) return a.number === null ? 1 : -1; // numbers come first
      if (a.number !== null) return sign * (a.number - b.number);
      return sign * a.text.localeCompare(b.text, "en", { numeric: true });
    });
    body.append(...keyed.map(({ row }) => row));
  }

  /* The points of the map; each image is kept once and shared by the image's point and its caption's. */
  function pointsOf({ rows, thumbnails, galleries }) {
    const points = [];
    rows.forEach((row, index) => {
      ["image", "caption"].forEach((kind, side) => {
        points.push({
          id: `${kind}:${index}`,
          pair: `${kind === "image" ? "caption" : "image"}:${index}`,
          kind,
          x: { tsne: row.tsne[2 * side], pca: row.pca[2 * side] },
          y: { tsne: row.tsne[2 * side + 1], pca: row.pca[2 * side + 1] },
          split: row.split,
          rank: row.ranks[side],
          gallery: galleries[side],
          caption: row.caption,
          image: thumbnails && thumbnails[index],
        });
      });
    });
    return points;
  }

  document.querySelectorAll("table.sortable").forEach(makeSortable);
  const data = document.getElementById("map-data");
  if (data) {
    const points = pointsOf(JSON.parse(data.textContent));
    window.reportMap = window.onceoverMap(document.getElementById("embedding-map"), { points });
  }
  let folded = []; // parts that were open only to be printed
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => { part.open = true; });
  });
  window.addEventListener("afterprint", () => {
    folded.forEach((part) => { part.open = false; });
  });
})();
