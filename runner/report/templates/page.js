// The page by hand and by keyboard: theme, filter, search, images. Everything is in the page before this runs.
"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const named = () => { theme.textContent = dark() ? "Light theme" : "Dark theme"; };
  theme.hidden = false;
  named();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });

  // An image that several rows show is in the page once.
  for (const image of document.querySelectorAll("img[data-same]")) {
    image.src = document.getElementById(image.dataset.same).src;
  }
  const dialog = document.getElementById("image");
  for (const button of document.querySelectorAll("button.thumb")) {
    button.addEventListener("click", () => {
      const shown = dialog.querySelector("img");
      shown.src = button.querySelector("img").src;
      shown.alt = button.querySelector("img").alt;
      dialog.querySelector("p").textContent = button.closest("tr").querySelector(".said").textContent;
      dialog.showModal();
    });
  }
  dialog.querySelector("button").addEventListener("click", () => dialog.close());

  const tools = document.querySelector(".tools");
  if (!tools) return;
  const AT_ONCE = 10;
  const rows = [...document.querySelectorAll("table.predictions tbody tr")];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const status = document.querySelector(".status");
  const said = status.textContent;
  const first = Number(status.dataset.total) > rows.length ? "the first " : "";
  const more = document.getElementById("more");
  const search = document.getElementById("search");
  let most = AT_ONCE;
  const show = () => {
    const became = tools.querySelector("input[name=became]:checked").value;
    const wanted = search.value.trim().toLowerCase();
    const found = rows.filter((row, at) =>
      (!became || row.dataset.became === became) && (!wanted || words[at].includes(wanted)));
    const shown = new Set(found.slice(0, most));
    for (const row of rows) row.hidden = !shown.has(row);
    more.hidden = found.length <= most;
    more.textContent = `Show ${Math.min(AT_ONCE, found.length - most)} more`;
    status.textContent = became || wanted ? `${found.length} of ${first}${rows.length} rows` : said;
  };
  const anew = () => { most = AT_ONCE; show(); };
  tools.hidden = false;
  tools.addEventListener("change", anew);
  search.addEventListener("input", anew);
  more.addEventListener("click", () => { most += AT_ONCE; show(); });
  anew();
})();
