// The image browser: filters, which are kept in the address; a chip for each; and a grid that holds only the cards in view.
const grid = $("grid"), search = $("search");
const GAP = 12, TEXT_HEIGHT = 60; // pixels between cards, and for the text under an image
const CHIP_TITLES = { q: "search", missing: "without region", without: "without label", absent: "named, not shown", past: "passed stage" };
// matches: positions of the records that pass the filters; current: index in them; cards: index → element;
// shape: columns and sizes of the grid; typing: timer of a search that has not started yet
let filters = new URLSearchParams(), matches = [], current = 0, cards = new Map(), shape = null, typing = 0;

// [title, value] of a filter.
function chipText(name, wanted) {
  const metric = metricOf.get(name);
  if (!metric) return [Object.hasOwn(CHIP_TITLES, name) ? CHIP_TITLES[name] : name, wanted === "" ? "not stated" : wanted.replace(":", ", ").replaceAll("_", " ")];
  const [low, high] = wanted.split("~").map((edge) => Number(edge) * metric.scale);
  const unit = metric.unit ? ` ${metric.unit}` : "";
  const title = fullTitle(metric);
  if (high === Infinity) return [title, low < 1e-300 ? "over 0" : `from ${number(low)}${unit}`];
  if (metric.whole && high - low === 1) return [title, `${number(low)}${unit}`];
  return [title, `${number(low)} to ${number(high)}${unit}`];
}

function go(next) {
  const query = next.toString();
  location.hash = query ? `#images?${query}` : "#images";
}

// The filters but for these.
function without(...names) {
  if (typing) searchNow();
  const next = new URLSearchParams(filters);
  for (const name of [...names, "of", "at"]) next.delete(name);
  return next;
}

function choose(name, wanted) {
  const next = without(name);
  if (wanted !== null) next.set(name, wanted);
  go(next);
}

async function showImages(next) {
  const all = await records();
  await fillSelects();
  filters = next;
  matches = matching(all, filters);
  current = Math.max(0, matches.indexOf(all.place.get(filters.get("at"))));
  if (document.activeElement !== search) search.value = filters.get("q") ?? "";
  const chips = [...filters].filter(([name]) => name !== "of" && name !== "at").map(([name, wanted]) => {
    const [title, text] = chipText(name, wanted);
    return el("button", { class: "chip", type: "button", "aria-label": `Remove filter ${title} ${text}`, onclick: () => go(without(name)) },
      el("span", {}, title), ` ${text} `, el("b", { "aria-hidden": "true" }, "×"));
  });
  $("chips").replaceChildren(...chips);
  if (chips.length > 1) $("chips").append(el("button", { class: "plain", type: "button", onclick: () => go(new URLSearchParams()) }, "clear all"));
  $("count").textContent = countText(Number(filters.get("of") || 0));
  for (const select of document.querySelectorAll("select[data-filter]")) select.value = filters.get(select.dataset.filter) ?? "*";
  cards.forEach((card) => card.remove());
  cards.clear();
  layout();
  grid.dataset.shown = location.hash;
  const open = all.place.get(filters.get("at"));
  if (open !== undefined) openDetail(open);
  else closeDetail();
}

// of: the number in the data set that a link states.
function countText(of) {
  if (of > matches.length) return `showing ${whole.format(matches.length)} of ${whole.format(of)}`;
  const text = `${whole.format(matches.length)} ${matches.length === 1 ? "record" : "records"}`;
  if (pageData.records === pageData.inputs) return text;
  const onPage = matches.length === pageData.records ? " on this page" : ` of the ${whole.format(pageData.records)} on this page`;
  return `${text}${onPage}; the data set has ${whole.format(pageData.inputs)}`;
}

function layout() {
  const width = grid.clientWidth, columns = Math.max(2, Math.floor((width + GAP) / (150 + GAP)));
  const side = Math.floor((width - GAP * (columns - 1)) / columns);
  shape = { columns, side, height: side + TEXT_HEIGHT + GAP };
  grid.style.height = `${Math.ceil(matches.length / columns) * shape.height}px`;
  $("nothing").hidden = matches.length > 0;
  cards.forEach(place);
  cardsInView();
}

function place(card, index) {
  card.style.width = `${shape.side}px`;
  card.style.height = `${shape.height - GAP}px`;
  card.style.transform = `translate(${(index % shape.columns) * (shape.side + GAP)}px, ${Math.floor(index / shape.columns) * shape.height}px)`;
}

// Adds the cards that are in view, or nearly, and removes the others.
async function cardsInView() {
  if ($("images").hidden || !shape) return;
  const all = await records(), top = grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((-top - 300) / shape.height) * shape.columns);
  const last = Math.min(matches.length, Math.ceil((innerHeight - top + 300) / shape.height) * shape.columns);
  for (const [index, card] of cards) if ((index < first || index >= last) && card !== document.activeElement) card.remove(), cards.delete(index);
  for (let index = first; index < last; index++) {
    if (cards.has(index)) continue;
    const card = makeCard(all, index);
    cards.set(index, card);
    place(card, index);
    grid.append(card);
  }
}

function makeCard(all, index) {
  const at = matches[index], text = all.caption[at] || all.detail[at] || all.source[at];
  const frame = el("span", { class: "frame" });
  if (all.sizes[at][0]) {
    const canvas = el("canvas", { role: "img", "aria-label": text, width: 96, height: 96 });
    frame.append(canvas);
    paint(canvas, at);
  } else frame.append(el("span", { class: "bare" }, "no image"));
  const state = all.status[at] === "ok" ? null : el("span", { class: `status ${all.status[at]}` }, all.reason[at].replaceAll("_", " "));
  return el("button", {
    class: "record", type: "button", role: "option", "data-index": index, "data-key": all.key[at], tabindex: index === current ? 0 : -1,
    "aria-posinset": index + 1, "aria-setsize": matches.length, "aria-selected": String(index === current),
    onclick: () => { current = index; openDetail(at); }, onfocus: () => { current = index; },
  }, frame, state, el("span", { class: "words", dir: "auto" }, text));
}

// Moves the focus to the card with this index, and scrolls it into view.
function move(index) {
  const card = cards.get(current);
  if (card) card.tabIndex = -1, card.setAttribute("aria-selected", "false");
  current = Math.min(matches.length - 1, Math.max(0, index));
  const top = grid.getBoundingClientRect().top + Math.floor(current / shape.columns) * shape.height;
  if (top < 150) scrollBy(0, top - 150);
  else if (top + shape.height > innerHeight) scrollBy(0, top + shape.height - innerHeight + GAP);
  cardsInView().then(() => {
    const next = cards.get(current);
    if (next) next.tabIndex = 0, next.setAttribute("aria-selected", "true"), next.focus({ preventScroll: true });
  });
}

function gridKey(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -shape.columns, ArrowDown: shape.columns, j: 1, k: -1, Home: -matches.length, End: matches.length };
  if (!(event.key in steps) || !matches.length) return false;
  const inside = grid.contains(document.activeElement);
  move(inside ? current + steps[event.key] : current);
  return true;
}

// Fills the drop-down lists with the values of the records on the page.
const fillSelects = once(async () => {
  const all = await records();
  const values = { status: all.status, reason: all.reason, shard: [...new Set(all.shard)].map(shardName), split: all.split };
  for (const select of document.querySelectorAll("select[data-filter]")) {
    const name = select.dataset.filter;
    const options = name === "missing" ? [...labelsOf.keys()] : [...new Set(values[name])].filter(Boolean).sort();
    select.append(el("option", { value: "*" }, `any ${select.getAttribute("aria-label").toLowerCase()}`));
    for (const option of options) select.append(el("option", { value: option }, option.replaceAll("_", " ")));
    select.value = filters.get(name) ?? "*";
    select.addEventListener("change", () => choose(name, select.value === "*" ? null : select.value));
  }
});

function searchNow() {
  clearTimeout(typing);
  typing = 0;
  filters = without("q");
  if (search.value.trim()) filters.set("q", search.value.trim());
  history.replaceState(null, "", `#images?${filters}`);
  showImages(filters);
}

search.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(searchNow, 120);
});
addEventListener("scroll", cardsInView, { passive: true });
addEventListener("resize", () => { if (!$("images").hidden) layout(); });
