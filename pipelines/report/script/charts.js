// Charts, drawn by plotly.js when they come into view. A click on a bar shows the records that it counts.
const library = once(() => unpacked("plotly"));
const plotly = once(async () => {
  const script = el("script");
  script.textContent = new TextDecoder().decode(await library()); // the content security policy allows it
  document.head.append(script);
  return window.Plotly;
});
const drawn = new Map(); // element → function that draws it
const font = () => ({ family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") });
const title = (text) => ({ text, font: { size: 12 }, standoff: 8 });

function axis(more = {}) {
  return { zeroline: false, showgrid: false, showline: true, linecolor: colour("line"), ticks: "outside", ticklen: 4, tickcolor: colour("line"), fixedrange: true, automargin: true, ...more };
}

function frame(height, more = {}) {
  return {
    height, margin: { l: 44, r: 8, t: 10, b: 32 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: font(), bargap: 0.06, dragmode: false, showlegend: false,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { ...font(), color: colour("ink") } },
    xaxis: axis(), yaxis: axis({ showgrid: true, gridcolor: colour("grid"), showline: false, ticks: "", nticks: 4 }), ...more,
  };
}

async function show(element, traces, layout, clicked) {
  const charts = await plotly();
  await charts.react(element, traces, layout, { displayModeBar: false, responsive: true, showTips: false });
  if (clicked && !element.dataset.clicks) {
    element.dataset.clicks = "yes";
    element.on("plotly_click", ({ points: [point] }) => { if (point.customdata != null) location.hash = point.customdata; });
  }
  element.dataset.drawn = "yes";
}

const address = (query) => `#images?${new URLSearchParams(query)}`;

// [label, count, address of its records] of each bin.
function bins(metric, distribution) {
  return distribution.counts.map((count, at) => {
    const [low, high] = [distribution.edges[at], distribution.edges[at + 1]];
    const unit = metric.unit ? ` ${metric.unit}` : "";
    const label = metric.whole && high - low === 1 ? `${number(low)}${unit}` : `${number(low * metric.scale)} to ${number(high * metric.scale)}${unit}`;
    return [label, count, address({ status: "ok", [metric.name]: `${low}~${high}`, of: count })];
  });
}

function distributionOf(name) {
  return name === "similarity" ? pageData.identities.similarity : metricOf.get(name).distribution;
}

function histogram(element) {
  const metric = metricOf.get(element.dataset.metric), distribution = distributionOf(metric.name), rows = bins(metric, distribution);
  const whole = metric.whole && distribution.edges[1] - distribution.edges[0] === 1, small = element.classList.contains("small");
  const middle = (at) => (whole ? distribution.edges[at] : ((distribution.edges[at] + distribution.edges[at + 1]) / 2) * metric.scale);
  const trace = {
    type: "bar", x: rows.map((_, at) => middle(at)), y: rows.map(([, count]) => count), customdata: rows.map(([, , to]) => to), hovertext: rows.map(([label, count]) => `${label}: <b>${number(count)}</b>`),
    hoverinfo: "text", marker: { color: colour("bar") }, width: whole ? 0.9 : undefined,
  };
  const rule = { type: "line", xref: "x", yref: "paper", y0: 0, y1: 1, x0: distribution.median * metric.scale, x1: distribution.median * metric.scale, line: { color: colour("ink"), width: 1, dash: "dot" } };
  const layout = frame(small ? 120 : 170, { shapes: [rule], bargap: whole ? 0.1 : 0.04 });
  layout.margin = { l: 40, r: 6, t: 6, b: 26 };
  if (whole && rows.length < 14) layout.xaxis.dtick = 1;
  return show(element, [trace], layout, true);
}

function funnel(element) {
  const steps = pageData.funnel.toReversed(), names = ["trainable", "written", ...steps.map(({ stage }) => stage), "inputs"];
  const yes = Number(element.dataset.trainable), left = [yes, pageData.written, ...steps.map((step) => step.left), pageData.inputs];
  const to = [address({ trainable: "yes", status: "ok", of: yes }), address({ status: "ok", of: pageData.written }), ...steps.map((step) => address({ past: step.stage, of: step.left })), address({ of: pageData.inputs })];
  const bar = (values, tone, customdata, text) => ({ type: "bar", orientation: "h", y: names, x: values, customdata, marker: { color: colour(tone) }, hovertext: values.map((v) => `${text} <b>${number(v)}</b>`), hoverinfo: "text" });
  const lost = (kind) => bar([0, 0, ...steps.map((step) => step[kind]), 0], kind, [null, null, ...steps.map((step) => address({ status: kind, stage: step.stage, of: step[kind] })), null], kind);
  const layout = frame(34 + 24 * names.length, { barmode: "stack", bargap: 0.3, yaxis: axis({ showline: false, ticks: "", ticklabelstandoff: 6 }), xaxis: axis({ rangemode: "tozero" }) });
  layout.margin = { l: 90, r: 10, t: 4, b: 28 };
  return show(element, [bar(left, "written", to, "left"), lost("dropped"), lost("failed")], layout, true);
}

function stages(element) {
  const colours = stageColours(), names = Object.keys(pageData.stage_seconds).toReversed(), values = names.map((name) => pageData.stage_seconds[name]);
  const trace = { type: "bar", orientation: "h", y: names, x: values, marker: { color: names.map((_, at) => colours[(names.length - 1 - at) % 8]) }, hovertext: values.map((v, i) => `${names[i]} <b>${seconds(v)}</b>`), hoverinfo: "text" };
  const layout = frame(34 + 24 * names.length, { bargap: 0.3, yaxis: axis({ showline: false, ticks: "", ticklabelstandoff: 6 }), xaxis: axis({ title: title("seconds, all shards") }) });
  layout.margin = { l: 90, r: 10, t: 4, b: 44 };
  return show(element, [trace], layout, false);
}

function sizes(element) {
  const entries = Object.entries(pageData.identities.sizes).map(([size, count]) => [Number(size), count]);
  const trace = {
    type: "bar", x: entries.map(([size]) => String(size)), y: entries.map(([, count]) => count), hoverinfo: "text", marker: { color: colour("bar") },
    hovertext: entries.map(([size, count]) => `<b>${number(count)}</b> of ${size}`), customdata: entries.map(([size, count]) => address({ identity_size: `${size}~${size + 1}`, of: size * count })),
  };
  const layout = frame(170, { xaxis: axis({ type: "category" }), bargap: 0.12 });
  layout.margin = { l: 40, r: 6, t: 6, b: 26 };
  return show(element, [trace], layout, true);
}

const stageColours = () => ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"].map(colour); // as in the table of stages

async function rates(element) {
  const { rows, runs } = await shards();
  const trace = {
    type: "scatter", mode: "markers", x: rows.map((_, at) => at), y: runs.map((run) => run.images_per_second), marker: { size: runs.length > 200 ? 4 : 7, color: colour("bar") }, hoverinfo: "text",
    hovertext: rows.map(({ shard }, at) => `${shard} <b>${number(runs[at].images_per_second)}</b> images/s`), customdata: rows.map(({ shard, inputs }) => address({ shard, of: inputs })),
  };
  return show(element, [trace], frame(220, { xaxis: axis({ title: title("shard") }), yaxis: axis({ rangemode: "tozero", showgrid: true, gridcolor: colour("grid"), showline: false, title: title("images/s") }) }), true);
}

async function perShard(element) {
  const { rows, runs } = await shards(), names = Object.keys(pageData.stage_seconds);
  const colours = stageColours();
  const traces = names.map((name, at) => ({
    type: "bar", name, x: rows.map((_, i) => i), y: rows.map((row, i) => (1000 * (runs[i].stage_seconds[name] ?? 0)) / row.inputs), marker: { color: colours[at % colours.length] },
    hovertext: rows.map((row, i) => `${row.shard} ${name} <b>${number((1000 * (runs[i].stage_seconds[name] ?? 0)) / row.inputs)}</b> ms per input`), hoverinfo: "text", customdata: rows.map(({ shard, inputs }) => address({ shard, of: inputs })),
  }));
  if (rows.length > 120) for (const trace of traces) Object.assign(trace, { type: "scatter", mode: "lines", line: { width: 0, color: trace.marker.color }, fillcolor: trace.marker.color, stackgroup: "all" });
  const layout = frame(220, { barmode: "stack", bargap: 0.15, xaxis: axis({ title: title("shard") }) });
  layout.yaxis.title = title("ms per input");
  return show(element, traces, layout, true);
}

// The title of a metric or a rate.
const seriesTitle = (name) => {
  const metric = metricOf.get(name);
  if (metric) return fullTitle(metric);
  return name.replace(/^missing_(.*)_share$/, "$1 missing").replace("_share", " share").replace("cut share", "share of cut captions");
};

async function drift(element) {
  const { rows, drift: everySeries } = await shards(), shown = everySeries.filter(({ away }) => away.some((z) => z !== null)).toReversed();
  const trace = {
    type: "heatmap", x: rows.map((_, at) => at), y: shown.map(({ name }) => seriesTitle(name)), z: shown.map(({ away }) => away), zmin: -8, zmax: 8, xgap: rows.length > 120 ? 0 : 1, ygap: 1, hoverinfo: "text",
    colorscale: [[0, colour("cold")], [0.5, colour("card")], [1, colour("warm")]], showscale: true, colorbar: { thickness: 8, outlinewidth: 0, len: 0.6, tickvals: [-5, 0, 5] },
    hovertext: shown.map((one) => one.away.map((z, at) => `${rows[at].shard}, ${seriesTitle(one.name)}: <b>${number(one.values[at])}</b>, ${number(z)} units`)), customdata: shown.map(() => rows.map(({ shard, inputs }) => address({ shard, of: inputs }))),
  };
  const flagged = shown.flatMap((one) => one.flagged.map((shard) => [rows.findIndex((row) => row.shard === shard), seriesTitle(one.name)]));
  const marks = { // around the flagged cells, which may be narrower than a pixel
    type: "scatter", mode: "markers", x: flagged.map(([at]) => at), y: flagged.map(([, name]) => name), hoverinfo: "text", marker: { symbol: "circle-open", size: 9, color: colour("ink"), line: { width: 1.5 } },
    hovertext: flagged.map(([at, name]) => `${rows[at].shard}, ${name}`), customdata: flagged.map(([at]) => address({ shard: rows[at].shard, of: rows[at].inputs })),
  };
  const layout = frame(60 + 15 * shown.length, { yaxis: axis({ showline: false, ticks: "", tickfont: { size: 11 }, dtick: 1, ticklabelstandoff: 4 }), xaxis: axis({ title: title("shard"), showline: false, range: [-0.5, rows.length - 0.5] }) });
  layout.margin = { l: 150, r: 6, t: 6, b: 40 };
  return show(element, [trace, marks], layout, true);
}

async function series(element) {
  const { rows, drift: everySeries } = await shards(), chosen = everySeries.find(({ name }) => name === $("series").value) ?? everySeries[0];
  const metric = metricOf.get(chosen.name), scale = metric ? metric.scale : 100, out = new Set(chosen.flagged);
  const unit = metric ? metric.unit : "%";
  const trace = {
    type: "scatter", mode: "markers", x: rows.map((_, at) => at), y: chosen.values.map((v) => (v === null ? null : v * scale)), hoverinfo: "text",
    marker: { size: rows.length > 200 ? 4 : 7, color: rows.map(({ shard }) => (out.has(shard) ? colour("failed") : colour("bar"))) },
    hovertext: rows.map(({ shard }, at) => `${shard} <b>${number(chosen.values[at] * scale)}</b> ${unit}, ${number(chosen.away[at])} units`), customdata: rows.map(({ shard, inputs }) => address({ shard, of: inputs })),
  };
  const middle = (chosen.middle ?? 0) * scale;
  const line = { type: "line", xref: "paper", x0: 0, x1: 1, y0: middle, y1: middle, line: { color: colour("ink"), width: 1, dash: "dot" } };
  return show(element, [trace], frame(240, { shapes: [line], xaxis: axis({ title: title("shard") }), yaxis: axis({ showgrid: true, gridcolor: colour("grid"), showline: false, title: title(unit) }) }), true);
}

const CHARTS = { histogram, funnel, stages, sizes, rates, perShard, drift, series };
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    drawn.set(target, CHARTS[target.dataset.chart]);
    CHARTS[target.dataset.chart](target);
  }
}, { rootMargin: "700px" });

function redraw() {
  for (const [element, draw] of drawn) draw(element);
}

// The bins of a histogram as a list, for those who can't use the chart.
for (const details of document.querySelectorAll("details.bins")) {
  details.addEventListener("toggle", () => {
    if (details.querySelector("ul")) return;
    const metric = metricOf.get(details.dataset.metric), list = el("ul");
    for (const [label, count, to] of bins(metric, distributionOf(metric.name))) if (count) list.append(el("li", {}, el("span", {}, label), el("a", { class: "count", href: to }, number(count))));
    details.append(list);
  });
}
