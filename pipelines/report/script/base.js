// Helpers of the other scripts. Text from outside the program enters the page only through `el`, as text nodes.
const pageData = JSON.parse(document.getElementById("page_data").textContent);
const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null)); // strings become text nodes
  return node;
}

// At most three decimals, fewer for larger numbers; the same as `number` in pipelines/report/text.py.
function number(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (value < 0) return `−${number(-value)}`;
  if (Number.isInteger(value)) return whole.format(value);
  const size = Math.abs(value), digits = size < 1 ? 3 : size < 10 ? 2 : 1;
  return new Intl.NumberFormat("en", { maximumFractionDigits: digits }).format(value);
}

// A number of bytes with a unit, in powers of ten.
function bytes(count) {
  if (count < 1000) return `${count} B`;
  const power = Math.min(Math.floor((String(count).length - 1) / 3), 4);
  return `${(count / 1000 ** power).toFixed(1)} ${["kB", "MB", "GB", "TB"][power - 1]}`;
}

function seconds(value) {
  if (value < 60) return value >= 0.1 ? `${value.toFixed(1)} s` : `${Math.round(1000 * value)} ms`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Bytes of base64 text.
function raw(text) {
  const binary = atob(text.trim()), out = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) out[i] = binary.charCodeAt(i);
  return out;
}

// Bytes of the gzip data in the element with this id.
async function unpacked(id) {
  const stream = new Blob([raw($(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// A function that calls `compute` the first time, and returns the same value every time.
const once = (compute) => {
  let value;
  return () => (value ??= compute());
};

// name → metric, with `row`, its row in the values of the records.
const metricOf = new Map(pageData.metrics.map((metric, row) => [metric.name, { ...metric, row }]));
metricOf.set("identity_size", { name: "identity_size", title: "Samples of the identity", scale: 1, unit: "", row: pageData.metrics.length });
metricOf.set("similarity", { name: "similarity", title: "Similarity to the nearest sample", scale: 1, unit: "", row: pageData.metrics.length + 1 });

// The title of a metric by itself, where its group is not shown.
function fullTitle(metric) {
  if (metric.name.startsWith("area_")) return `area of ${metric.title}`;
  return metric.name.startsWith("words_") ? `words on ${metric.title}` : metric.title.toLowerCase();
}

const shardName = (index) => `fgid-${String(index).padStart(6, "0")}`;
const link = (query, ...children) => el("a", { class: "count", href: `#images?${new URLSearchParams(query)}` }, ...children);

// A colour of the style sheet in the current colour scheme.
function colour(name) {
  const probe = $("probe");
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
