// Start: shows one of the two views, handles keys and the colour scheme, and fills the examples of the ledger.
let statisticsScroll = 0; // where the statistics were scrolled to

function route() {
  const [name, query = ""] = location.hash.slice(1).split("?");
  const toImages = name === "images", wasImages = !$("images").hidden;
  if (toImages && !wasImages) statisticsScroll = scrollY;
  $("images").hidden = !toImages;
  $("statistics-view").hidden = toImages;
  for (const tab of document.querySelectorAll("[data-view]")) tab.toggleAttribute("aria-current", (tab.dataset.view === "images") === toImages);
  if (toImages) {
    if (!wasImages || !query.includes("at=")) scrollTo(0, 0);
    showImages(new URLSearchParams(query));
  } else {
    closeDetail();
    if (name && $(name)) $(name).scrollIntoView();
    else if (wasImages) scrollTo(0, statisticsScroll);
  }
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typingIn = event.target.matches("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && event.target === search) search.blur();
  if (typingIn) return;
  if (act(event)) event.preventDefault();
}

// True if the key has a meaning here.
function act(event) {
  if ($("help").open) return event.key === "?" && ($("help").close(), true);
  const part = PARTS[Number(event.key) - 1];
  if (part) return togglePart(part[0]), true;
  if (event.key === "o") return toggleOverlay(), true;
  if (event.key === "b") return toggleBoxes(), true;
  if (event.key === "?") return $("help").showModal(), true;
  if (event.key === "/") {
    closeDetail();
    if ($("images").hidden) {
      history.pushState(null, "", "#images");
      route();
    }
    search.focus();
    return true;
  }
  if (dialog.open) {
    const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    return by ? (step(by), true) : false;
  }
  return !$("images").hidden && !event.target.matches("a, #images button:not(.record)") && gridKey(event);
}

function switchColourScheme() {
  const root = document.documentElement, dark = getComputedStyle(root).colorScheme === "dark" || (root.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.style.colorScheme = dark ? "light" : "dark";
  redraw();
}

// Thumbnails of the examples of each reason.
async function fillExamples() {
  const all = await records();
  for (const place of document.querySelectorAll("[data-examples]")) {
    const places = place.dataset.examples.split(" ").map((key) => all.place.get(key)).filter((at) => at !== undefined && all.sizes[at][0]);
    place.append(...places.map((at) => el("button", { type: "button", class: "example", "aria-label": all.source[at], title: all.source[at], onclick: () => { matches = places; openDetail(at); } }, lazyCanvas(at, ""))));
  }
}

$("theme").addEventListener("click", switchColourScheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
$("help-open").addEventListener("click", () => $("help").showModal());
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("series").addEventListener("change", () => { if (drawn.has($("series-chart"))) series($("series-chart")); });
addEventListener("hashchange", route);
document.addEventListener("keydown", key);
for (const place of document.querySelectorAll("[data-toggles]")) place.append(...toggles());
$("strength").addEventListener("input", () => { overlay.strength = $("strength").value / 100; repaint(); });
repaint();

// The records come after this script in the page, so they are read when the page is complete.
async function start() {
  route();
  if ($("images").hidden) library(); // unpacks the charting library while the rest is filled
  await Promise.all([fillExamples(), fillShards()]);
  document.documentElement.dataset.ready = "yes";
  for (const element of document.querySelectorAll("[data-chart]")) seen.observe(element);
}
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
