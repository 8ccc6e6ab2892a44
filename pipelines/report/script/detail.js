// One record, large: picture, words, figures, where it comes from, what became of it and whom it is like.
const dialog = $("detail");
const regionColour = Object.fromEntries(pageData.regions.map(({ word, color }) => [word, color]));
const WORDS = /\b(face|ears?|eyes?|nose|mouth|lips?)\b/gi;
const regionOf = (word) => ({ ear: "ears", eye: "eyes", lip: "mouth", lips: "mouth" })[word.toLowerCase()] ?? word.toLowerCase();
const WHY = { word_not_in_caption: "its word is not in the captions", caption_too_long: "its word is cut off: the captions are too long" };
let opened = -1;

function marked(text) {
  const parts = [];
  let end = 0;
  for (const hit of text.matchAll(WORDS)) {
    parts.push(text.slice(end, hit.index), tinted(hit[0], regionOf(hit[0])));
    end = hit.index + hit[0].length;
  }
  return [...parts, text.slice(end)];
}

function tinted(text, region, tag = "mark") {
  const node = el(tag, { class: "region" }, text);
  node.style.setProperty("--region", regionColour[region]);
  return node;
}

const rows = (pairs) => el("dl", { class: "pairs" }, ...pairs.filter(([, text]) => text !== "" && text != null)
  .map(([name, text]) => el("div", { class: typeof text === "string" && text.length > 32 ? "long" : "" }, el("dt", {}, name), el("dd", { dir: "auto" }, text))));

async function openDetail(at) {
  const all = await records();
  opened = at;
  const index = found.indexOf(at);
  const canvas = el("canvas", { role: "img", "aria-label": all.caption[at] || all.source[at], "data-scale": 5 });
  $("detail-picture").replaceChildren(all.sizes[at][0] ? canvas : el("p", { class: "bare" }, "no picture was kept"));
  $("detail-words").replaceChildren(...words(all, at));
  $("detail-place").textContent = index < 0 ? "" : `${whole.format(index + 1)} of ${whole.format(found.length)}`;
  if (all.sizes[at][0]) paint(canvas, at, 5);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  if (!$("pictures").hidden) {
    const next = new URLSearchParams(filters);
    next.set("at", all.key[at]);
    history.replaceState(null, "", `#pictures?${next}`);
  }
}

function closeDetail() {
  if (dialog.open) dialog.close();
}

dialog.addEventListener("close", () => {
  if ($("pictures").hidden) return;
  filters.delete("at");
  history.replaceState(null, "", `#pictures${filters.size ? "?" + filters : ""}`);
  if (found.includes(opened)) move(found.indexOf(opened));
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

function step(by) {
  const index = found.indexOf(opened) + by;
  if (index >= 0 && index < found.length) openDetail(found[index]);
}

function words(all, at) {
  const status = all.status[at];
  const head = el("header", {},
    el("p", {}, el("span", { class: `verdict ${status}` }, status === "ok" ? "written" : status), " ", status === "ok" ? "" : el("b", {}, all.reason[at].replaceAll("_", " "))),
    el("h2", { id: "detail-title", dir: "auto" }, all.source[at]),
    all.detail[at] ? el("p", { class: "note", dir: "auto" }, `${all.stage[at]}: ${all.detail[at]}`) : all.stage[at] ? el("p", { class: "note" }, `at ${all.stage[at]}`) : null);
  return [head, captions(all, at), trainer(all, at), figuresOf(all, at), provenance(all, at), ...likes(all, at)].filter(Boolean);
}

function part(title, ...children) {
  return el("section", {}, el("h3", {}, title), ...children);
}

function captions(all, at) {
  if (!all.caption[at] && !all.face_caption[at]) return null;
  return part("Captions", el("p", { class: "caption", dir: "auto" }, ...marked(all.caption[at])), el("p", { class: "caption", dir: "auto" }, ...marked(all.face_caption[at])));
}

function trainer(all, at) {
  if (all.trainable[at] === null) return null;
  const list = el("ul", { class: "fusing" });
  for (const word of all.fused[at]) list.append(el("li", {}, tinted(word, word, "span"), " fused"));
  for (const pair of all.unfused[at]) {
    const [word, reason] = pair.split(":");
    list.append(el("li", {}, tinted(word, word, "span"), ` not fused: ${WHY[reason] ?? reason.replaceAll("_", " ")}`));
  }
  for (const word of all.absent[at]) list.append(el("li", {}, tinted(word, word, "span"), " named by a caption, not in the label map"));
  return part(all.trainable[at] ? "In training" : "In training: not used, no region can be fused", list);
}

function figuresOf(all, at) {
  const pairs = [];
  for (const figure of figureOf.values()) {
    const found = value(all, figure.name, at);
    const group = figure.name.startsWith("area_") ? "area of " : figure.name.startsWith("words_") ? "words on " : "";
    const unit = figure.unit && figure.unit !== "words" ? ` ${figure.unit}` : "";
    if (!Number.isNaN(found)) pairs.push([`${group}${group ? figure.title : figure.title.toLowerCase()}`, `${number(found * figure.scale)}${unit}`]);
  }
  return pairs.length ? part("Figures", rows(pairs)) : null;
}

function provenance(all, at) {
  const size = (width, height) => (width ? `${width} × ${height}` : "");
  const span = (offset, length) => (offset < 0 ? "" : `${whole.format(offset)}, ${bytes(length)}`);
  return part("Provenance", rows([
    ["key", all.key[at]], ["sha256", all.sha256[at]], ["licence", all.license[at]], ["author", all.author[at]], ["consent", all.consent[at]],
    ["source size", size(all.source_width[at], all.source_height[at])], ["size", size(all.width[at], all.height[at])],
    ["shard", link({ shard: shardName(all.shard[at]) }, shardName(all.shard[at]))],
    ["offset in the tar", span(all.tar_offset[at], all.tar_size[at])], ["offset in the quarantine tar", span(all.quarantine_offset[at], all.quarantine_size[at])],
    ["identity", all.identity_id[at] && link({ identity: all.identity_id[at] }, all.identity_id[at])], ["split", all.split[at]],
  ]));
}

function likes(all, at) {
  const out = [];
  if (all.nearest[at].length) {
    out.push(part("Nearest identities", el("div", { class: "strip" }, ...all.nearest[at].map((key, index) => {
      const other = all.place.get(key), text = all.similarity[at][index].toFixed(2);
      return other === undefined ? el("span", { class: "other", title: "not among the records of this page" }, key.slice(0, 8), el("small", {}, text)) : thumb(all, other, text);
    }))));
  }
  const size = value(all, "identity_size", at);
  if (size > 1) {
    const others = all.identity_id.map((id, index) => (id === all.identity_id[at] && index !== at ? index : -1)).filter((index) => index >= 0);
    out.push(part("Of the same identity", el("div", { class: "strip" }, ...others.slice(0, 11).map((index) => thumb(all, index, ""))),
      el("p", {}, link({ identity: all.identity_id[at], of: size }, `all ${whole.format(size)}`))));
  }
  return out;
}

function thumb(all, at, text) {
  return el("button", { class: "other", type: "button", "data-key": all.key[at], "aria-label": `${all.caption[at] || all.source[at]} ${text}`, onclick: () => openDetail(at) },
    all.sizes[at][0] ? lazyCanvas(at, "") : el("span", { class: "bare" }, "–"), text ? el("small", {}, text) : null);
}
