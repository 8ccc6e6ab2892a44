// The browser of samples: filters in the address, their chips, and a grid of which only the cards in view exist.
const grid = $("grid"), search = $("search");
const GAP = 12, UNDER = 60; // pixels between cards, and for the words under a picture
const CHIP = { q: "search", missing: "lacks", without: "without label", absent: "named, not there", past: "went beyond" };
let filters = new URLSearchParams(), found = [], current = 0, cards = new Map(), shape = null, typing = 0;

function chipText(name, wanted) {
  const figure = figureOf.get(name);
  if (!figure) return [Object.hasOwn(CHIP, name) ? CHIP[name] : name, wanted === "" ? "none" : wanted.replace(":", ", ").replaceAll("_", " ")];
  const [low, high] = wanted.split("~").map((edge) => Number(edge) * figure.scale);
  const unit = figure.unit ? ` ${figure.unit}` : "";
  const title = figure.name.startsWith("area_") ? `area of ${figure.title}` : figure.name.startsWith("words_") ? `words on ${figure.title}` : figure.title.toLowerCase();
  if (high === Infinity) return [title, low < 1e-300 ? "over 0" : `from ${number(low)}${unit}`];
  if (figure.whole && high - low === 1) return [title, `${number(low)}${unit}`];
  return [title, `${number(low)} to ${number(high)}${unit}`];
}

function go(next) {
  const query = next.toString();
  location.hash = query ? `#pictures?${query}` : "#pictures";
}

function without(...names) {
  if (typing) searchNow(); // a word may still wait to be searched
  const next = new URLSearchParams(filters);
  for (const name of [...names, "of", "at"]) next.delete(name);
  return next;
}

function choose(name, wanted) {
  const next = without(name);
  if (wanted !== null) next.set(name, wanted);
  go(next);
}

async function showPictures(next) {
  const all = await records();
  await fillSelects();
  filters = next;
  found = matching(all, filters);
  current = Math.max(0, found.indexOf(all.place.get(filters.get("at"))));
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

function countText(of) {
  if (of > found.length) return `showing ${whole.format(found.length)} of ${whole.format(of)}`;
  const text = `${whole.format(found.length)} ${found.length === 1 ? "record" : "records"}`;
  if (pageData.records === pageData.inputs) return text;
  const here = found.length === pageData.records ? " on this page" : ` of the ${whole.format(pageData.records)} on this page`;
  return `${text}${here}; the set has ${whole.format(pageData.inputs)}`;
}

function layout() {
  const width = grid.clientWidth, columns = Math.max(2, Math.floor((width + GAP) / (150 + GAP)));
  const side = Math.floor((width - GAP * (columns - 1)) / columns);
  shape = { columns, side, height: side + UNDER + GAP };
  grid.style.height = `${Math.ceil(found.length / columns) * shape.height}px`;
  $("nothing").hidden = found.length > 0;
  cards.forEach(place);
  cardsInView();
}

function place(card, index) {
  card.style.width = `${shape.side}px`;
  card.style.height = `${shape.height - GAP}px`;
  card.style.transform = `translate(${(index % shape.columns) * (shape.side + GAP)}px, ${Math.floor(index / shape.columns) * shape.height}px)`;
}

async function cardsInView() {
  if ($("pictures").hidden || !shape) return;
  const all = await records(), top = grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((-top - 300) / shape.height) * shape.columns);
  const last = Math.min(found.length, Math.ceil((innerHeight - top + 300) / shape.height) * shape.columns);
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
  const at = found[index], words = all.caption[at] || all.detail[at] || all.source[at];
  const frame = el("span", { class: "frame" });
  if (all.sizes[at][0]) {
    const canvas = el("canvas", { role: "img", "aria-label": words, width: 96, height: 96 });
    frame.append(canvas);
    paint(canvas, at);
  } else frame.append(el("span", { class: "bare" }, "no picture"));
  const state = all.status[at] === "ok" ? null : el("span", { class: `verdict ${all.status[at]}` }, all.reason[at].replaceAll("_", " "));
  return el("button", {
    class: "sample", type: "button", role: "option", "data-index": index, "data-key": all.key[at], tabindex: index === current ? 0 : -1,
    "aria-posinset": index + 1, "aria-setsize": found.length, "aria-selected": String(index === current),
    onclick: () => { current = index; openDetail(at); }, onfocus: () => { current = index; },
  }, frame, state, el("span", { class: "words", dir: "auto" }, words));
}

// Move in the grid: by one, by a row, or to an end.
function move(index) {
  const card = cards.get(current);
  if (card) card.tabIndex = -1, card.setAttribute("aria-selected", "false");
  current = Math.min(found.length - 1, Math.max(0, index));
  const top = grid.getBoundingClientRect().top + Math.floor(current / shape.columns) * shape.height;
  if (top < 150) scrollBy(0, top - 150);
  else if (top + shape.height > innerHeight) scrollBy(0, top + shape.height - innerHeight + GAP);
  cardsInView().then(() => {
    const next = cards.get(current);
    if (next) next.tabIndex = 0, next.setAttribute("aria-selected", "true"), next.focus({ preventScroll: true });
  });
}

function gridKey(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -shape.columns, ArrowDown: shape.columns, j: 1, k: -1, Home: -found.length, End: found.length };
  if (!(event.key in steps) || !found.length) return false;
  const inside = grid.contains(document.activeElement);
  move(inside ? current + steps[event.key] : current);
  return true;
}

// The choices: every value that the records on the page have.
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
  history.replaceState(null, "", `#pictures?${filters}`);
  showPictures(filters);
}

search.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(searchNow, 120);
});
addEventListener("scroll", cardsInView, { passive: true });
addEventListener("resize", () => { if (!$("pictures").hidden) layout(); });
