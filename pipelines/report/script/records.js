// The records and their pictures, unpacked when they are wanted; and what the filters mean.
const records = once(async () => {
  const [columns, values] = await Promise.all([unpacked("records"), unpacked("values")]);
  const all = JSON.parse(new TextDecoder().decode(columns));
  all.values = new Float64Array(values);
  all.count = all.key.length;
  all.place = new Map(all.key.map((key, at) => [key, at]));
  return all;
});

const value = (all, name, at) => all.values[figureOf.get(name).row * all.count + at];

// Bytes of a chunk's pictures, and where each begins; the last few chunks are kept.
const chunks = new Map();
function chunkOf(all, at) {
  const number = Math.floor(at / pageData.chunk);
  if (!chunks.has(number)) {
    const starts = [];
    let offset = 0;
    for (let i = number * pageData.chunk; i < Math.min(all.count, (number + 1) * pageData.chunk); i++) {
      starts.push(offset);
      offset += all.sizes[i][0] + all.sizes[i][1];
    }
    chunks.set(number, { data: raw($(`chunk-${number}`).textContent), starts });
    if (chunks.size > 24) chunks.delete(chunks.keys().next().value);
  }
  return chunks.get(number);
}

// {photo: ImageBitmap, labels: bytes or null} of a record, or null where there is no picture.
const pictures = new Map();
function picture(all, at) {
  if (!pictures.has(at)) {
    pictures.set(at, decode(all, at));
    if (pictures.size > 500) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(at);
}

async function decode(all, at) {
  const [photoSize, labelSize] = all.sizes[at];
  if (!photoSize) return null;
  const { data, starts } = chunkOf(all, at), start = starts[at % pageData.chunk];
  const photo = await createImageBitmap(new Blob([data.subarray(start, start + photoSize)]));
  if (!labelSize) return { photo, labels: null };
  const png = new Blob([data.subarray(start + photoSize, start + photoSize + labelSize)]);
  const map = await createImageBitmap(png, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(map.width, map.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(map, 0, 0);
  const pixels = context.getImageData(0, 0, map.width, map.height).data;
  const labels = new Uint8Array(map.width * map.height);
  for (let i = 0; i < labels.length; i++) labels[i] = pixels[4 * i];
  return { photo, labels, width: map.width, height: map.height };
}

// Filters are the parameters of the address: one value each, all of which must hold.
const labelsOf = new Map(pageData.regions.map(({ word, labels }) => [word, labels]));
const lacks = (mask, labels) => mask >= 0 && labels.every((label) => mask & (1 << label));
const order = pageData.funnel.map((step) => step.stage);
const EXACT = ["status", "reason", "stage", "split", "license", "author", "consent"];
const TESTS = {
  shard: (all, name) => (at) => shardName(all.shard[at]) === name,
  identity: (all, name) => (at) => all.identity_id[at] === name,
  missing: (all, region) => (at) => labelsOf.has(region) && lacks(all.missing[at], labelsOf.get(region)),
  without: (all, label) => (at) => pageData.labels.includes(label) && lacks(all.missing[at], [pageData.labels.indexOf(label)]),
  fused: (all, word) => (at) => all.fused[at].includes(word),
  unfused: (all, pair) => (at) => all.unfused[at].includes(pair),
  absent: (all, word) => (at) => all.absent[at].includes(word),
  trainable: (all, said) => (at) => ({ true: "yes", false: "no" })[all.trainable[at]] === said || (all.trainable[at] === null && said === "unknown"),
  past: (all, stage) => (at) => all.status[at] === "ok" || order.indexOf(all.stage[at]) > order.indexOf(stage),
  size: (all, size) => (at) => `${all.width[at]}x${all.height[at]}` === size,
  q: (all, text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean), hay = haystack(all);
    return (at) => words.every((word) => hay[at].includes(word));
  },
};

let stack = null;
const SEARCHED = ["caption", "face_caption", "source", "key", "license", "author", "reason", "detail", "identity_id"];
function haystack(all) {
  stack ??= all.key.map((_, at) => SEARCHED.map((name) => all[name][at]).join("\n").toLowerCase());
  return stack;
}

function test(all, name, wanted) {
  if (EXACT.includes(name)) return (at) => all[name][at] === wanted;
  if (Object.hasOwn(TESTS, name)) return TESTS[name](all, wanted);
  if (!figureOf.has(name)) return null;
  const [low, high] = wanted.split("~").map(Number), first = figureOf.get(name).row * all.count;
  return (at) => all.values[first + at] >= low && all.values[first + at] < high; // NaN is never in
}

function matching(all, filters) {
  const tests = [...filters].filter(([name]) => name !== "of" && name !== "at").map((pair) => test(all, ...pair)).filter(Boolean);
  const found = [];
  for (let at = 0; at < all.count; at++) if (tests.every((holds) => holds(at))) found.push(at);
  return found;
}
