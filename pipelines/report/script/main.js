// Which of the two views is shown, keys, light and dark; and the pictures in the ledger.
let figuresAt = 0;

function route() {
  const [name, query = ""] = location.hash.slice(1).split("?");
  const toPictures = name === "pictures", wasPictures = !$("pictures").hidden;
  if (toPictures && !wasPictures) figuresAt = scrollY;
  $("pictures").hidden = !toPictures;
  $("figures-view").hidden = toPictures;
  for (const tab of document.querySelectorAll("[data-view]")) tab.toggleAttribute("aria-current", (tab.dataset.view === "pictures") === toPictures);
  if (toPictures) {
    if (!wasPictures || !query.includes("at=")) scrollTo(0, 0);
    showPictures(new URLSearchParams(query));
  } else {
    closeDetail();
    if (name && $(name)) $(name).scrollIntoView();
    else if (wasPictures) scrollTo(0, figuresAt);
  }
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typingIn = event.target.matches("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && event.target === search) search.blur();
  if (typingIn) return;
  if (act(event)) event.preventDefault();
}

function act(event) {
  if ($("help").open) return event.key === "?" && ($("help").close(), true);
  const part = PARTS[Number(event.key) - 1];
  if (part) return togglePart(part[0]), true;
  if (event.key === "o") return toggleOverlay(), true;
  if (event.key === "b") return toggleBoxes(), true;
  if (event.key === "?") return $("help").showModal(), true;
  if (event.key === "/") {
    closeDetail();
    if ($("pictures").hidden) {
      history.pushState(null, "", "#pictures");
      route();
    }
    search.focus();
    return true;
  }
  if (dialog.open) {
    const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    return by ? (step(by), true) : false;
  }
  return !$("pictures").hidden && !event.target.matches("a, #pictures button:not(.sample)") && gridKey(event);
}

function theme() {
  const root = document.documentElement, dark = getComputedStyle(root).colorScheme === "dark" || (root.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.style.colorScheme = dark ? "light" : "dark";
  redraw();
}

async function examples() {
  const all = await records();
  for (const place of document.querySelectorAll("[data-examples]")) {
    const places = place.dataset.examples.split(" ").map((key) => all.place.get(key)).filter((at) => at !== undefined && all.sizes[at][0]);
    place.append(...places.map((at) => el("button", { type: "button", class: "example", "aria-label": all.source[at], title: all.source[at], onclick: () => { found = places; openDetail(at); } }, lazyCanvas(at, ""))));
  }
}

$("theme").addEventListener("click", theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
$("help-open").addEventListener("click", () => $("help").showModal());
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("track").addEventListener("change", () => { if (drawn.has($("track-chart"))) track($("track-chart")); });
addEventListener("hashchange", route);
document.addEventListener("keydown", key);
for (const place of document.querySelectorAll("[data-toggles]")) place.append(...toggles());
$("strength").addEventListener("input", () => { overlay.strength = $("strength").value / 100; repaint(); });
repaint();

// The records lie behind this script: they are read once the page is whole.
async function start() {
  route();
  if ($("pictures").hidden) library(); // unpacked beside the rest
  await Promise.all([examples(), fillShards()]);
  document.documentElement.dataset.ready = "yes";
  for (const element of document.querySelectorAll("[data-chart]")) seen.observe(element);
}
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
