// The table of shards, which can be sorted by each column and is shown in pages.
const shards = once(async () => JSON.parse(new TextDecoder().decode(await unpacked("shards-data"))));
const PAGE = 25;
const table = { by: "shard", descending: false, page: 0 };
const COLUMNS = [
  ["shard", "shard"], ["inputs", "inputs"], ["written", "written"], ["dropped", "dropped"], ["failed", "failed"], ["tar", "tar_bytes"], ["quarantine tar", "quarantine_bytes"],
  ["time", "seconds"], ["images/s", "images_per_second"], ["executor", "executor"], ["attempt", "attempt"], ["flags", "flags"],
];

async function fillShards() {
  const { rows, runs, drift: everySeries } = await shards();
  const flags = rows.map(({ shard }) => everySeries.filter(({ flagged }) => flagged.includes(shard)).length);
  const all = rows.map((row, at) => ({ ...row, ...runs[at], flags: flags[at] }));
  const sign = table.descending ? -1 : 1;
  all.sort((a, b) => sign * (a[table.by] > b[table.by] ? 1 : a[table.by] < b[table.by] ? -1 : 0));
  const pages = Math.ceil(all.length / PAGE);
  table.page = Math.min(Math.max(0, table.page), pages - 1);
  $("shard-head").replaceChildren(...COLUMNS.map(([name, key]) => {
    const sorted = table.by === key ? (table.descending ? "descending" : "ascending") : "none";
    return el("th", { scope: "col", "aria-sort": sorted, class: ["shard", "executor"].includes(key) ? "" : "n" }, el("button", { type: "button", class: "plain", onclick: () => sortBy(key) }, name, sorted === "none" ? "" : table.descending ? " ↓" : " ↑"));
  }));
  $("shard-rows").replaceChildren(...all.slice(table.page * PAGE, (table.page + 1) * PAGE).map(shardRow));
  $("shard-pages").replaceChildren(...(pages > 1 ? [
    el("button", { type: "button", disabled: table.page === 0, onclick: () => turnPage(-1) }, "previous"),
    el("span", {}, `${table.page * PAGE + 1}–${Math.min(all.length, (table.page + 1) * PAGE)} of ${whole.format(all.length)}`),
    el("button", { type: "button", disabled: table.page === pages - 1, onclick: () => turnPage(1) }, "next"),
  ] : []));
}

function shardRow(row) {
  const count = (key, query) => el("td", { class: "n" }, row[key] ? link({ shard: row.shard, ...query, of: row[key] }, whole.format(row[key])) : "0");
  return el("tr", {},
    el("th", { scope: "row", class: "mono" }, link({ shard: row.shard, of: row.inputs }, row.shard)),
    count("inputs", {}), count("written", { status: "ok" }), count("dropped", { status: "dropped" }), count("failed", { status: "failed" }),
    el("td", { class: "n" }, bytes(row.tar_bytes)), el("td", { class: "n" }, bytes(row.quarantine_bytes)), el("td", { class: "n" }, seconds(row.seconds)),
    el("td", { class: "n" }, number(row.images_per_second)), el("td", {}, row.executor), el("td", { class: "n" }, String(row.attempt)),
    el("td", { class: row.flags ? "n failed" : "n" }, row.flags ? String(row.flags) : ""));
}

function sortBy(key) {
  table.descending = table.by === key ? !table.descending : key !== "shard";
  Object.assign(table, { by: key, page: 0 });
  fillShards();
}

function turnPage(by) {
  table.page += by;
  fillShards();
}
