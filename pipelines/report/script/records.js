// The records and their thumbnails, unpacked when they are first used; and the filters.
// A record is addressed by its position, `at`, in the columns of `records()`.
const records = once(async () => {
  const [columns, values] = await Promise.all([unpacked("records"), unpacked("values")]);
  const all = JSON.parse(new TextDecoder().decode(columns));
  all.values = new Float64Array(values);
  all.count = all.key.length;
  all.place = new Map(all.key.map((key, at) => [key, at]));
  return all;
});

// A record's value of a metric.
const value = (all, name, at) => all.values[metricOf.get(name).row * all.count + at];

// The bytes of the chunk that holds a record's thumbnail, and where each thumbnail starts; the last chunks are cached.
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

// {image: ImageBitmap, labels: bytes or null} of a record, or null where it has no thumbnail.
const thumbnails = new Map();
function thumbnail(all, at) {
  if (!thumbnails.has(at)) {
    thumbnails.set(at, decode(all, at));
    if (thumbnails.size > 500) thumbnails.delete(thumbnails.keys().next().value);
  }
  return thumbnails.get(at);
}

async function decode(all, at) {
  const [imageSize, labelSize] = all.sizes[at];
  if (!imageSize) return null;
  const { data, starts } = chunkOf(all, at), start = starts[at % pageData.chunk];
  const image = await createImageBitmap(new Blob([data.subarray(start, start + imageSize)]));
  if (!labelSize) return { image, labels: null };
  const png = new Blob([data.subarray(start + imageSize, start + imageSize + labelSize)]);
  const map = await createImageBitmap(png, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(map.width, map.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(map, 0, 0);
  const pixels = context.getImageData(0, 0, map.width, map.height).data;
  const labels = new Uint8Array(map.width * map.height);
  for (let i = 0; i < labels.length; i++) labels[i] = pixels[4 * i];
  return { image, labels, width: map.width, height: map.height };
}

// A filter is a parameter of the address, with one value; a record must pass all of them. TESTS: name → function
// that takes all records and the value, and returns the test of one record.
const labelsOf = new Map(pageData.regions.map(({ word, labels }) => [word, labels]));
const lacks = (mask, labels) => mask >= 0 && labels.every((label) => mask & (1 << label));
const stageOrder = pageData.funnel.map((step) => step.stage);
const EXACT = ["status", "reason", "stage", "split", "license", "author", "consent", "person"];
const TESTS = {
  shard: (all, name) => (at) => shardName(all.shard[at]) === name,
  identity: (all, name) => (at) => all.identity_id[at] === name,
  missing: (all, region) => (at) => labelsOf.has(region) && lacks(all.missing[at], labelsOf.get(region)),
  without: (all, label) => (at) => pageData.labels.includes(label) && lacks(all.missing[at], [pageData.labels.indexOf(label)]),
  fused: (all, word) => (at) => all.fused[at].includes(word),
  unfused: (all, pair) => (at) => all.unfused[at].includes(pair),
  absent: (all, word) => (at) => all.absent[at].includes(word),
  trainable: (all, answer) => (at) => ({ true: "yes", false: "no" })[all.trainable[at]] === answer || (all.trainable[at] === null && answer === "unknown"),
  past: (all, stage) => (at) => all.status[at] === "ok" || stageOrder.indexOf(all.stage[at]) > stageOrder.indexOf(stage),
  size: (all, size) => (at) => `${all.width[at]}x${all.height[at]}` === size,
  q: (all, text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean), texts = searchTexts(all);
    return (at) => words.every((word) => texts[at].includes(word));
  },
};

let cachedTexts = null;
const SEARCHED = ["caption", "face_caption", "source", "key", "license", "author", "person", "reason", "detail", "identity_id"];
// For each record the text that a search looks through.
function searchTexts(all) {
  cachedTexts ??= all.key.map((_, at) => SEARCHED.map((name) => all[name][at]).join("\n").toLowerCase());
  return cachedTexts;
}

// The test of a filter, or null for a name that is no filter. A metric's value is LOW~HIGH.
function test(all, name, wanted) {
  if (EXACT.includes(name)) return (at) => all[name][at] === wanted;
  if (Object.hasOwn(TESTS, name)) return TESTS[name](all, wanted);
  if (!metricOf.has(name)) return null;
  const [low, high] = wanted.split("~").map(Number), first = metricOf.get(name).row * all.count;
  return (at) => all.values[first + at] >= low && all.values[first + at] < high; // false for NaN
}

// Positions of the records that pass all filters. `of` and `at` are none: a number that a link states, and a key.
function matching(all, filters) {
  const tests = [...filters].filter(([name]) => name !== "of" && name !== "at").map((pair) => test(all, ...pair)).filter(Boolean);
  const passing = [];
  for (let at = 0; at < all.count; at++) if (tests.every((passes) => passes(at))) passing.push(at);
  return passing;
}
