// Draws a record's thumbnail on a canvas: the image, the selected parts of its label map in colours, the face boxes.
const PARTS = [
  ["face", ["skin", "left_brow", "right_brow"]], ["ears", ["left_ear", "right_ear"]], ["eyes", ["left_eye", "right_eye"]],
  ["nose", ["nose"]], ["mouth", ["mouth", "upper_lip", "lower_lip"]], ["hair", ["hair"]], ["neck", ["neck"]],
  ["clothes", ["cloth"]], ["accessories", ["glasses", "earring", "necklace", "hat"]],
];
const rgb = pageData.palette.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const overlay = { on: true, strength: 0.4, boxes: false, parts: new Set(PARTS.slice(0, 5).map(([name]) => name)) };
const painted = new Set(); // canvases that were drawn

// For each label 1 if it is drawn, else 0.
function shownLabels() {
  const labels = new Uint8Array(pageData.labels.length);
  if (overlay.on) for (const [name, members] of PARTS) if (overlay.parts.has(name)) for (const m of members) labels[pageData.labels.indexOf(m)] = 1;
  return labels;
}

// at: position of the record. scale: canvas pixels for each pixel of the thumbnail.
async function paint(canvas, at, scale = 1) {
  canvas.dataset.at = at;
  const all = await records(), pixels = await thumbnail(all, at);
  if (!pixels || Number(canvas.dataset.at) !== at) return; // the canvas was given another record meanwhile
  const width = pixels.image.width * scale, height = pixels.image.height * scale;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(pixels.image, 0, 0, width, height);
  const labels = shownLabels();
  if (pixels.labels && labels.some(Boolean) && !("plain" in canvas.dataset)) {
    context.globalAlpha = overlay.strength;
    context.drawImage(coloured(pixels, labels), 0, 0, width, height);
    context.globalAlpha = 1;
  }
  if (overlay.boxes && !("plain" in canvas.dataset)) drawBoxes(context, all.faces[at], all.face[at], width, height);
  canvas.dataset.labels = pixels.labels ? labels.join("") : "";
  painted.add(canvas);
}

// The label map in the colours of its labels; transparent where a label is not wanted.
function coloured({ labels, width, height }, wanted) {
  const image = new ImageData(width, height);
  for (let i = 0; i < labels.length; i++) {
    const label = labels[i];
    if (label && wanted[label]) image.data.set([...rgb[label], 255], 4 * i);
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawBoxes(context, faces, chosen, width, height) {
  faces.forEach(([x, y, w, h], index) => {
    for (const [style, line] of [["rgb(0 0 0 / 0.6)", 3], ["#fff", 1]]) {
      context.strokeStyle = style;
      context.lineWidth = (line * width) / 240 + 0.5;
      context.setLineDash(index === chosen ? [] : [4, 3]);
      context.strokeRect(x * width, y * height, w * width, h * height);
    }
  });
}

function repaint() {
  for (const canvas of painted) {
    if (canvas.isConnected) paint(canvas, Number(canvas.dataset.at), Number(canvas.dataset.scale || 1));
    else painted.delete(canvas);
  }
  for (const box of document.querySelectorAll("[data-part]")) box.checked = overlay.on && overlay.parts.has(box.dataset.part);
  for (const box of document.querySelectorAll("[data-boxes]")) box.checked = overlay.boxes;
}

function togglePart(name) {
  if (!overlay.on) Object.assign(overlay, { on: true, parts: new Set([name]) });
  else if (!overlay.parts.delete(name)) overlay.parts.add(name);
  repaint();
}

function toggles() {
  const rows = PARTS.map(([name, members], index) => {
    const swatch = el("i", { class: "swatch" });
    swatch.style.background = pageData.palette[pageData.labels.indexOf(members.at(name === "mouth" ? 1 : 0))];
    const box = el("input", { type: "checkbox", "data-part": name, onchange: () => togglePart(name) });
    return el("label", {}, box, swatch, name, el("kbd", {}, String(index + 1)));
  });
  const faces = el("input", { type: "checkbox", "data-boxes": true, onchange: () => toggleBoxes() });
  return [...rows, el("label", {}, faces, "boxes", el("kbd", {}, "b"))];
}

function toggleOverlay() {
  overlay.on = !overlay.on;
  repaint();
}

function toggleBoxes() {
  overlay.boxes = !overlay.boxes;
  repaint();
}

// Draws canvases when they come into view.
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    waiting.unobserve(target);
    paint(target, Number(target.dataset.at), Number(target.dataset.scale || 1));
  }
}, { rootMargin: "200px" });

function lazyCanvas(at, label) {
  const canvas = el("canvas", { role: "img", "aria-label": label, "data-at": at, "data-plain": true, width: 96, height: 96 });
  waiting.observe(canvas);
  return canvas;
}
