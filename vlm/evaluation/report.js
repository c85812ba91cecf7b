// Filters, sorts and pages the rows. Without it they are all shown.
(() => {
  "use strict";
  const list = document.getElementById("rows");
  const form = document.getElementById("filters");
  if (!list || !form) return;
  const rows = Array.from(list.querySelectorAll("article"));
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const pagers = Array.from(document.querySelectorAll(".pager"));
  const status = document.getElementById("row-status");
  const control = (name) => form.elements.namedItem(name);
  const number = (row, name) => Number(row.dataset[name]);
  const orders = {
    worst: (a, b) => number(a, "rank") - number(b, "rank"),
    best: (a, b) => number(b, "rank") - number(a, "rank"),
    lost: (a, b) => number(a, "gain") - number(b, "gain"),
    gained: (a, b) => number(b, "gain") - number(a, "gain"),
    dataset: (a, b) => number(a, "position") - number(b, "position"),
  };
  let page = 0;

  function show(focus) {
    const words = control("words").value.toLowerCase().trim();
    const kind = control("kind").value;
    const size = Number(control("size").value);
    const found = rows
      .filter((row) => !kind || row.dataset.kinds.split(" ").includes(kind))
      .filter((row) => !words || texts.get(row).includes(words))
      .sort(orders[control("order").value]);
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(Math.max(page, 0), pages - 1);
    const shown = found.slice(page * size, (page + 1) * size);
    rows.forEach((row) => { row.hidden = true; });
    shown.forEach((row) => { row.hidden = false; list.append(row); });
    const range = shown.length ? `Rows ${page * size + 1} to ${page * size + shown.length} of ${found.length}` : "No row fits";
    status.textContent = `${range}, page ${page + 1} of ${pages}.`;
    for (const pager of pagers) {
      pager.hidden = pages === 1;
      pager.querySelector("[data-step='-1']").disabled = page === 0;
      pager.querySelector("[data-step='1']").disabled = page === pages - 1;
      pager.querySelector("span").textContent = `Page ${page + 1} of ${pages}`;
    }
    if (focus && shown.length) {
      shown[0].focus({ preventScroll: true });
      shown[0].scrollIntoView();
    }
  }

  form.addEventListener("input", () => { page = 0; show(false); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { page = 0; show(false); }));
  for (const pager of pagers) {
    pager.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      page += Number(button.dataset.step);
      show(true);
    });
  }
  form.hidden = false;
  show(false);
})();
