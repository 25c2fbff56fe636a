"use strict";
// Comfort only: without this script the page says the same things.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      let said = "Copied";
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        said = "Selected";
      }
      button.textContent = said;
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const zoom = document.getElementById("zoom");
  if (zoom) {
    const picture = document.getElementById("timeline"), view = picture.parentElement, said = zoom.querySelector("output");
    let level = 1;
    const scale = (by) => {
      const wanted = Math.min(8, Math.max(1, by > 0 ? level * 2 : level / 2));
      const middle = (view.scrollLeft + view.clientWidth / 2) / view.scrollWidth;
      picture.style.width = `${wanted * 100}%`;
      picture.dataset.zoom = wanted;
      said.textContent = `${(level = wanted)}\u00d7`;
      view.scrollLeft = middle * view.scrollWidth - view.clientWidth / 2;
    };
    zoom.hidden = false;
    for (const button of zoom.querySelectorAll("button")) button.addEventListener("click", () => scale(+button.dataset.zoom));
    view.addEventListener("keydown", (event) => {
      if (event.key === "+" || event.key === "=") scale(1);
      if (event.key === "-") scale(-1);
    });
  }

  const filter = document.getElementById("filter");
  if (!filter) return;
  filter.hidden = false;
  const rows = [...document.querySelectorAll("#rivals tbody tr")];
  const update = () => {
    const wanted = new Set([...filter.querySelectorAll("input:checked")].map((box) => box.value));
    const words = document.getElementById("words").value.toLowerCase().replaceAll(" x ", " × ").trim();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !wanted.has(row.dataset.status) || !row.textContent.toLowerCase().includes(words);
      shown += row.hidden ? 0 : 1;
    }
    document.getElementById("shown").textContent = shown === rows.length ? "" : `${shown} of ${rows.length}`;
  };
  filter.addEventListener("input", update);
  filter.addEventListener("submit", (event) => event.preventDefault());
})();
