// The dialog that shows one record: image, status, captions, training, metrics, provenance, similar samples.
const dialog = $("detail");
const regionColour = Object.fromEntries(pageData.regions.map(({ word, color }) => [word, color]));
const WORDS = /\b(face|ears?|eyes?|nose|mouth|lips?)\b/gi;
const regionOf = (word) => ({ ear: "ears", eye: "eyes", lip: "mouth", lips: "mouth" })[word.toLowerCase()] ?? word.toLowerCase();
const NOT_FUSED = { word_not_in_caption: "its word is not in the captions", caption_too_long: "its word is cut off, as the captions are too long" };
let opened = -1; // position of the record

// The text with the words that name a region underlined in its colour.
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

// [name, text] pairs as a list, without empty texts.
const pairList = (pairs) => el("dl", { class: "pairs" }, ...pairs.filter(([, text]) => text !== "" && text != null)
  .map(([name, text]) => el("div", { class: typeof text === "string" && text.length > 32 ? "long" : "" }, el("dt", {}, name), el("dd", { dir: "auto" }, text))));

async function openDetail(at) {
  const all = await records();
  opened = at;
  const index = matches.indexOf(at);
  const canvas = el("canvas", { role: "img", "aria-label": all.caption[at] || all.source[at], "data-scale": 5 });
  $("detail-image").replaceChildren(all.sizes[at][0] ? canvas : el("p", { class: "bare" }, "no thumbnail"));
  $("detail-words").replaceChildren(...detailParts(all, at));
  $("detail-place").textContent = index < 0 ? "" : `${whole.format(index + 1)} of ${whole.format(matches.length)}`;
  if (all.sizes[at][0]) paint(canvas, at, 5);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  if (!$("images").hidden) {
    const next = new URLSearchParams(filters);
    next.set("at", all.key[at]);
    history.replaceState(null, "", `#images?${next}`);
  }
}

function closeDetail() {
  if (dialog.open) dialog.close();
}

dialog.addEventListener("close", () => {
  if ($("images").hidden) return;
  filters.delete("at");
  history.replaceState(null, "", `#images${filters.size ? "?" + filters : ""}`);
  if (matches.includes(opened)) move(matches.indexOf(opened));
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Opens the next (1) or previous (-1) record.
function step(by) {
  const index = matches.indexOf(opened) + by;
  if (index >= 0 && index < matches.length) openDetail(matches[index]);
}

function detailParts(all, at) {
  const status = all.status[at];
  const head = el("header", {},
    el("p", {}, el("span", { class: `status ${status}` }, status === "ok" ? "written" : status), " ", status === "ok" ? "" : el("b", {}, all.reason[at].replaceAll("_", " "))),
    el("h2", { id: "detail-title", dir: "auto" }, all.source[at]),
    all.detail[at] ? el("p", { class: "note", dir: "auto" }, `${all.stage[at]}: ${all.detail[at]}`) : all.stage[at] ? el("p", { class: "note" }, `stage ${all.stage[at]}`) : null);
  return [head, captions(all, at), training(all, at), metricValues(all, at), provenance(all, at), ...similar(all, at)].filter(Boolean);
}

function part(title, ...children) {
  return el("section", {}, el("h3", {}, title), ...children);
}

function captions(all, at) {
  if (!all.caption[at] && !all.face_caption[at]) return null;
  return part("Captions", el("p", { class: "caption", dir: "auto" }, ...marked(all.caption[at])), el("p", { class: "caption", dir: "auto" }, ...marked(all.face_caption[at])), contradicted(all.contradicted[at]));
}

// The list of contradicted claims, null without one.
function contradicted(text) {
  if (!text) return null;
  return el("ul", { class: "fusing" }, ...text.split("; ").map((claim) => el("li", { dir: "auto" }, `contradicted: ${claim}`)));
}

function training(all, at) {
  if (all.trainable[at] === null) return null;
  const list = el("ul", { class: "fusing" });
  for (const word of all.fused[at]) list.append(el("li", {}, tinted(word, word, "span"), " fused"));
  for (const pair of all.unfused[at]) {
    const [word, reason] = pair.split(":");
    list.append(el("li", {}, tinted(word, word, "span"), ` not fused: ${NOT_FUSED[reason] ?? reason.replaceAll("_", " ")}`));
  }
  for (const word of all.absent[at]) list.append(el("li", {}, tinted(word, word, "span"), " named by a caption, not in the label map"));
  return part(all.trainable[at] ? "Training" : "Training: not trainable, no region is fused", list);
}

function metricValues(all, at) {
  const pairs = [];
  for (const metric of metricOf.values()) {
    const stored = value(all, metric.name, at);
    const unit = metric.unit && metric.unit !== "words" ? ` ${metric.unit}` : "";
    if (!Number.isNaN(stored)) pairs.push([fullTitle(metric), `${number(stored * metric.scale)}${unit}`]);
  }
  return pairs.length ? part("Metrics", pairList(pairs)) : null;
}

function provenance(all, at) {
  const size = (width, height) => (width ? `${width} × ${height}` : "");
  const span = (offset, length) => (offset < 0 ? "" : `${whole.format(offset)}, ${bytes(length)}`);
  return part("Provenance", pairList([
    ["key", all.key[at]], ["sha256", all.sha256[at]], ["licence", all.license[at]], ["author", all.author[at]], ["consent", all.consent[at]], ["person", all.person[at]],
    ["source size", size(all.source_width[at], all.source_height[at])], ["size", size(all.width[at], all.height[at])],
    ["shard", link({ shard: shardName(all.shard[at]) }, shardName(all.shard[at]))],
    ["offset in the tar", span(all.tar_offset[at], all.tar_size[at])], ["offset in the quarantine tar", span(all.quarantine_offset[at], all.quarantine_size[at])],
    ["identity", all.identity_id[at] && link({ identity: all.identity_id[at] }, all.identity_id[at])], ["split", all.split[at]],
  ]));
}

// The nearest samples, and others of the same identity.
function similar(all, at) {
  const parts = [];
  if (all.nearest[at].length) {
    parts.push(part("Nearest samples", el("div", { class: "strip" }, ...all.nearest[at].map((key, index) => {
      const other = all.place.get(key), text = all.similarity[at][index].toFixed(2);
      return other === undefined ? el("span", { class: "other", title: "not on this page" }, key.slice(0, 8), el("small", {}, text)) : thumb(all, other, text);
    }))));
  }
  const size = value(all, "identity_size", at);
  if (size > 1) {
    const others = all.identity_id.map((id, index) => (id === all.identity_id[at] && index !== at ? index : -1)).filter((index) => index >= 0);
    parts.push(part("Samples of the same identity", el("div", { class: "strip" }, ...others.slice(0, 11).map((index) => thumb(all, index, ""))),
      el("p", {}, link({ identity: all.identity_id[at], of: size }, `all ${whole.format(size)}`))));
  }
  return parts;
}

function thumb(all, at, text) {
  return el("button", { class: "other", type: "button", "data-key": all.key[at], "aria-label": `${all.caption[at] || all.source[at]} ${text}`, onclick: () => openDetail(at) },
    all.sizes[at][0] ? lazyCanvas(at, "") : el("span", { class: "bare" }, "–"), text ? el("small", {}, text) : null);
}
