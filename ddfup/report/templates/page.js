"use strict";
(() => {
  const FIRST = 12, STEP = 24;
  const table = document.getElementById("table");
  const body = table && table.tBodies[0];
  const gallery = document.getElementById("cards");
  const tools = document.querySelector(".tools");
  const more = document.getElementById("more");

  // --- the slider of each image ---
  document.querySelectorAll(".stage").forEach((stage) => {
    const range = stage.querySelector("input");
    const left = stage.querySelector(".left").textContent;
    const move = () => {
      stage.style.setProperty("--split", range.value + "%");
      range.setAttribute("aria-valuetext", left + " " + range.value + " percent");
    };
    range.addEventListener("input", move);
    // A browser may restore an older position.
    move();
    // The range itself serves keys and screen readers. Pointers go to the picture: some browsers move a range
    // by its thumb alone, and a finger that scrolls the page must not move it at all.
    let held = null, from = null;
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      range.value = Math.round(100 * (event.clientX - box.left) / box.width);
      move();
    };
    stage.addEventListener("pointerdown", (event) => {
      if (held !== null || event.button !== 0) return;
      held = event.pointerId;
      stage.setPointerCapture(held);
      range.focus({ preventScroll: true });
      // A finger may yet turn out to scroll: it counts once it goes sideways, or is lifted where it came down.
      from = event.pointerType === "touch" ? event : null;
      if (!from) follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerId !== held) return;
      if (from) {
        const across = Math.abs(event.clientX - from.clientX), down = Math.abs(event.clientY - from.clientY);
        if (across < 6 || across < down) return;
        from = null;
      }
      follow(event);
    });
    stage.addEventListener("pointerup", (event) => {
      if (event.pointerId !== held) return;
      held = null;
      if (!from || Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) < 12) follow(event);
    });
    stage.addEventListener("pointercancel", (event) => { if (event.pointerId === held) held = null; });
    stage.addEventListener("dragstart", (event) => event.preventDefault());
    // Or the focus would go from the range to the page.
    stage.addEventListener("mousedown", (event) => event.preventDefault());
  });

  // --- sharp pictures from the folder beside the page, if it is there ---
  const sharpen = (image) => {
    const full = new Image();
    full.onload = () => { image.src = full.src; };
    full.src = image.dataset.full;
    image.removeAttribute("data-full");
  };
  const watch = new IntersectionObserver((entries) => {
    entries.forEach((entry) => {
      if (!entry.isIntersecting) return;
      watch.unobserve(entry.target);
      sharpen(entry.target);
    });
  }, { rootMargin: "200px" });
  document.querySelectorAll("img[data-full]").forEach((image) => watch.observe(image));

  if (!body) return;

  // --- sorting ---
  const rows = [...body.rows];
  const text = (row) => row.cells[0].textContent;
  const value = (row, column) => {
    const raw = row.cells[column].dataset.v;
    return raw === undefined || raw === "nan" ? NaN : raw === "inf" ? Infinity : raw === "-inf" ? -Infinity : +raw;
  };
  const compare = (column, sign) => (one, two) => {
    const names = text(one).localeCompare(text(two), "en", { numeric: true });
    if (column === 0) return sign * names;
    const a = value(one, column), b = value(two, column);
    // What is not defined stands last, whichever way.
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || names;
    return a === b ? names : sign * (a < b ? -1 : 1);
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      // First the worst; the names from A to Z.
      const first = button.dataset.better === "lower" ? "descending" : "ascending";
      const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      rows.sort(compare(column, order === "ascending" ? 1 : -1));
      body.append(...rows);
    });
  });

  if (!gallery) return;

  // --- the images: order, search, a few at a time ---
  const order = document.getElementById("order");
  const find = document.getElementById("find");
  const found = document.getElementById("found");
  const pairs = rows.map((row) => ({
    row, name: text(row).toLowerCase(), card: document.querySelector(row.cells[0].firstElementChild.getAttribute("href")),
  }));
  let shown = FIRST;
  const show = () => {
    const wanted = find.value.trim().toLowerCase();
    const hits = pairs.filter((pair) => pair.name.includes(wanted));
    pairs.forEach((pair) => { pair.card.hidden = pair.row.hidden = true; });
    hits.forEach((pair, index) => { pair.row.hidden = false; pair.card.hidden = index >= shown; });
    more.hidden = hits.length <= shown;
    more.textContent = "Show " + Math.min(STEP, hits.length - shown) + " more (" + (hits.length - shown) + " left)";
    found.textContent = wanted ? hits.length + " of " + pairs.length : "";
  };
  const arrange = () => {
    const column = +order.value + 1;
    const better = heads[column].querySelector("button").dataset.better;
    const by = compare(column, better === "lower" ? -1 : 1);
    pairs.sort((one, two) => by(one.row, two.row));
    gallery.append(...pairs.map((pair) => pair.card));
    shown = FIRST;
    show();
  };
  order.addEventListener("change", arrange);
  find.addEventListener("input", () => { shown = FIRST; show(); });
  more.addEventListener("click", () => {
    const next = pairs.filter((pair) => !pair.row.hidden)[shown];
    shown += STEP;
    show();
    next.card.focus({ preventScroll: true });
  });
  // A row's name leads to its card, which may not be shown yet.
  body.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    const card = document.querySelector(link.getAttribute("href"));
    card.hidden = false;
    card.scrollIntoView();
    card.focus({ preventScroll: true });
  });
  tools.hidden = false;
  arrange();
})();
