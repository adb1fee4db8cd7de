"use strict";
// What is shown follows from `data` (page.py says what it holds) and `state`, which the address keeps after its #.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f", "#9467bd", "#b5b837"];
const SCALE = [[0, "#e69f00"], [0.25, "#7fb21f"], [0.5, "#1f9a8a"], [0.75, "#3a6fb5"], [1, "#8a55c4"]];
const AXES = { step: "step", epoch: "epoch", images: "images seen", seconds: "training time (s)" };
const DEFAULTS = { x: "epoch", filter: "", colour: data.groups.length <= PALETTE.length ? "run" : data.sort, smooth: "0",
  logy: "", theme: "", sx: data.scatter[0], sy: data.sort, figure: data.figures[0] || "", off: "", panels: data.shown.join(" "),
  by: "", down: "" };
const state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
if (!(state.x in AXES)) state.x = DEFAULTS.x;

// -- values

const settingKeys = [...new Set(data.groups.flatMap((g) => Object.keys(g.settings)))];
const isNumber = (v) => typeof v === "number" && Number.isFinite(v);
const text = (v) => (v === undefined ? "" : v === null ? "null" : typeof v === "object" ? JSON.stringify(v) : String(v));
const has = (object, key) => Object.hasOwn(object, key);
const value = (g, key) => has(g.settings, key) ? g.settings[key] : has(g.metrics, key) ? g.metrics[key]
  : key === "status" ? g.status : key === "name" ? g.name : has(g.config, key) ? g.config[key]
  : has(g.config, `choices.${key}`) ? g.config[`choices.${key}`] : undefined;
// of a long text its end, where paths differ
const ending = (s, most) => (s.length > most ? `…${s.slice(1 - most)}` : s);
const shortest = (v) => Math.abs(v) >= 1e9 ? `${(v / 1e9).toPrecision(4)} G` : Math.abs(v) >= 1e5 ? `${(v / 1e6).toPrecision(4)} M`
  : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(3) : Number.isInteger(v) ? String(v)
  : Math.abs(v) >= 10 ? String(Number(v.toPrecision(4))) : v.toFixed(4);
// Plotly takes some HTML in its texts
const plain = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// -- filter: as where= of compare.py, and words that a name or a setting must hold; spaces and `and` join, `or` divides

const SIGNS = { "==": (a, b) => a === b, "!=": (a, b) => a !== b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b,
  "=": (a, b) => a === b, ">": (a, b) => a > b, "<": (a, b) => a < b, "~": (a, b) => a.includes(b) };
const CONDITION = /^([\w./@-]+?)(==|!=|>=|<=|=|>|<|~)(.+)$/;
const unquoted = (s) => (/^(['"]).*\1$/.test(s) ? s.slice(1, -1) : s);
const bare = (v) => text(v).replace(/[\s'"]/g, "").toLowerCase();
function parsed(filter) {  // a list of ways, each a list of conditions and words
  const joined = filter.trim().replace(/\s*(==|!=|>=|<=|=|>|<|~)\s*/g, "$1");
  const tokens = joined.match(/(?:[^\s'"]|'[^']*'|"[^"]*")+|['"]/g) || [];
  const ways = [[]];
  for (const token of tokens) {
    if (token.toLowerCase() === "or") ways.push([]);
    else if (token.toLowerCase() !== "and") {
      const found = token.match(CONDITION);
      ways[ways.length - 1].push(found ? { key: found[1], sign: found[2], wanted: unquoted(found[3]) } : { word: unquoted(token).toLowerCase() });
    }
  }
  return ways.filter((way) => way.length || ways.length === 1);
}
function keeps(g, ways) {
  const all = [...g.runs.map((run) => run.name), g.status, ...Object.entries(g.settings).map(([k, v]) => `${k}=${text(v)}`)].join(" ").toLowerCase();
  return ways.some((way) => way.every(({ word, key, sign, wanted }) => {
    if (word !== undefined) return all.includes(word);
    const got = value(g, key), number = Number(wanted);
    if (key === "seed" && typeof got === "string")  // of a group: any of its runs
      return got.split(",").some((seed) => (sign === "~" ? seed.includes(wanted) : SIGNS[sign](Number(seed), number)));
    if (key === "name") return g.runs.some((run) => SIGNS[sign](bare(run.name), bare(wanted)));
    if (isNumber(got) && !Number.isNaN(number) && sign !== "~") return SIGNS[sign](got, number);
    if (">=<=".includes(sign) && sign !== "=" && sign !== "==") return false;
    return SIGNS[sign](bare(got === undefined ? null : got), bare(wanted.toLowerCase() === "none" ? "null" : wanted));
  }));
}
function unknownKey(ways) {
  const known = (key) => data.groups.some((g) => value(g, key) !== undefined);
  return ways.flat().filter((c) => c.key && !known(c.key)).map((c) => c.key)[0];
}
const words = () => parsed(state.filter);
const off = () => new Set(state.off.split(" ").filter(Boolean).map(Number));
const kept = () => data.groups.filter((g) => keeps(g, words()));
const shown = () => { const hidden = off(); return kept().filter((g) => !hidden.has(g.id)); };

// -- colours

function mixed(share) {
  const i = Math.min(SCALE.length - 2, Math.floor(share * (SCALE.length - 1)));
  const part = share * (SCALE.length - 1) - i;
  const rgb = [SCALE[i][1], SCALE[i + 1][1]].map((c) => [1, 3, 5].map((p) => parseInt(c.slice(p, p + 2), 16)));
  return `rgb(${rgb[0].map((c, k) => Math.round(c + part * (rgb[1][k] - c))).join(",")})`;
}
function colours() {
  const key = state.colour;
  if (key === "run") return (g) => PALETTE[g.id % PALETTE.length];
  const values = data.groups.map((g) => value(g, key));
  const numbers = values.filter(isNumber);
  if (numbers.length === values.filter((v) => v !== undefined && v !== null).length && new Set(numbers).size > 2) {
    // by rank: rates and times are far apart, accuracies are not
    const sorted = [...new Set(numbers)].sort((a, b) => (data.low.some((end) => key.endsWith(end)) ? a - b : b - a));
    return (g) => { const v = value(g, key); return isNumber(v) ? mixed(sorted.indexOf(v) / Math.max(1, sorted.length - 1)) : "#8a8a8a"; };
  }
  const kinds = [...new Set(values.map(text))];
  return (g) => PALETTE[kinds.indexOf(text(value(g, key))) % PALETTE.length];
}

function drawLegend(colour) {
  const key = state.colour, groups = shown();
  const entry = (color, label) => {
    const item = document.createElement("span"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color;
    item.append(swatch, ` ${label}`);
    return item;
  };
  if (key === "run") { $("legend").replaceChildren(); return; }  // the table has them
  const seen = new Map();
  for (const g of groups) seen.set(colour(g), value(g, key));
  const order = [...seen].sort(([, a], [, b]) => (isNumber(a) && isNumber(b) ? a - b : text(a).localeCompare(text(b))));
  const few = order.length <= 12 ? order : [0, 0.25, 0.5, 0.75, 1].map((p) => order[Math.round(p * (order.length - 1))]);
  $("legend").replaceChildren(`${key}: `, ...few.map(([color, v]) => entry(color, isNumber(v) ? shortest(v) : ending(text(v), 40) || "(none)")));
}

// -- the table

function drawTable(colour) {
  const columns = [...settingKeys, ...data.columns];
  const head = document.createElement("tr");
  for (const key of ["name", "status", ...columns]) {
    const cell = document.createElement("th");
    const arrow = state.by === key ? (state.down ? " ▾" : " ▴") : "";
    cell.textContent = (key === "name" ? "run" : data.columns.includes(key) && key.startsWith("val/") ? `best.ckpt ${key}` : key) + arrow;
    cell.tabIndex = 0;
    cell.title = "sort";
    if (data.columns.includes(key)) cell.className = "number";
    cell.onclick = () => {
      const again = state.by === key;
      const low = data.low.some((end) => key.endsWith(end));
      set({ by: key, down: again ? (state.down ? "" : "1") : data.columns.includes(key) && !low ? "1" : "" });
    };
    cell.onkeydown = (event) => { if (event.key === "Enter") cell.onclick(); };
    head.append(cell);
  }
  $("runs").tHead.replaceChildren(head);
  const rows = kept();
  if (state.by) {
    const sign = state.down ? -1 : 1;
    const absent = (v) => v === undefined || v === null;
    rows.sort((a, b) => {
      const [x, y] = [value(a, state.by), value(b, state.by)];
      if (absent(x) || absent(y)) return absent(x) - absent(y);
      return sign * (isNumber(x) && isNumber(y) ? x - y : text(x).localeCompare(text(y), undefined, { numeric: true }));
    });
  }
  const hidden = off();
  const best = Object.fromEntries(data.columns.map((key) => {
    const numbers = rows.map((g) => g.metrics[key]).filter(isNumber);
    const low = data.low.some((end) => key.endsWith(end));
    return [key, numbers.length > 1 && !["parameters", "seconds"].includes(key) ? (low ? Math.min(...numbers) : Math.max(...numbers)) : undefined];
  }));
  $("runs").tBodies[0].replaceChildren(...rows.map((g) => {
    const row = document.createElement("tr");
    row.className = hidden.has(g.id) ? "off" : "";
    const name = row.insertCell();
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(g.id) });
    box.setAttribute("aria-label", `show ${g.name}`);
    box.onchange = () => {
      if (box.checked) hidden.delete(g.id); else hidden.add(g.id);
      set({ off: [...hidden].join(" ") });
    };
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.background = colour(g);
    name.append(box, swatch, ` ${g.name}`);
    name.title = g.paths.join("\n");
    const status = row.insertCell();
    status.textContent = g.status;
    if (g.status === "failed") status.className = "failed";
    for (const key of settingKeys) {
      const cell = row.insertCell();
      const setting = g.settings[key];
      cell.title = text(setting);
      cell.textContent = isNumber(setting) ? String(Number(setting.toPrecision(6))) : ending(text(setting), 40);
    }
    for (const key of data.columns) {
      const cell = row.insertCell(), number = g.metrics[key];
      cell.className = number !== undefined && number === best[key] ? "number best" : "number";
      cell.textContent = isNumber(number) ? shortest(number) + (g.std[key] ? `±${shortest(Number(g.std[key].toPrecision(3)))}` : "") + (has(g.fewer, key) ? ` (${g.fewer[key]})` : "") : "";
    }
    return row;
  }));
}

// -- curves

function between(x, xs, ys) {  // linear, and null beyond what is known
  if (!xs.length || x < xs[0] || x > xs[xs.length - 1]) return null;
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
  const part = xs[high] === xs[low] ? 0 : (x - xs[low]) / (xs[high] - xs[low]);
  return ys[low] + part * (ys[high] - ys[low]);
}
function along(run, steps) {  // steps as the chosen axis has them; null where that is not known of the run
  if (state.x === "step") return steps;
  if (state.x === "seconds") return run.clock[0].length ? steps.map((s) => between(s, ...run.clock)) : null;
  const factor = state.x === "epoch" ? 1 / run.per_epoch : run.per_step;
  return Number.isFinite(factor) && factor > 0 ? steps.map((s) => (s + 1) * factor) : null;
}
function smoothed(ys) {
  const weight = Number(state.smooth);
  let mean = 0, total = 0;
  return ys.map((y) => { mean = weight * mean + (1 - weight) * y; total = weight * total + (1 - weight); return mean / total; });
}
// a run that has diverged would leave the others a line at the bottom
const lowest = (traces) => { const low = Math.min(...traces.map((t) => Math.min(...t.y))); return low >= 0 ? 0 : low; };
function cut(traces) {
  const ys = traces.flatMap((t) => t.y).filter((y) => y !== null).sort((a, b) => a - b);
  const most = ys[Math.floor(0.9 * (ys.length - 1))];
  return traces.length > 1 && most > 0 && ys[ys.length - 1] > 20 * most ? 1.3 * most : null;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function layout(more) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12 },
    margin: { l: 52, r: 14, t: 34, b: 48 }, showlegend: false, autosize: true,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") }, hovermode: "closest", ...more,
    hoverlabel: { namelength: -1, align: "left" }, xaxis: { ...axis, ...more.xaxis, title: { standoff: 6, ...more.xaxis?.title } }, yaxis: { ...axis, ...more.yaxis } };
}
// Plotly would offer to send a chart to its cloud
const CONFIG = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "", displayModeBar: "hover", responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function drawCurves(groups, colour) {
  const wanted = new Set(state.panels.split(" ").filter(Boolean));
  $("choose").replaceChildren(...data.panels.map((key) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: wanted.has(key) });
    box.onchange = () => {
      if (box.checked) wanted.add(key); else wanted.delete(key);
      set({ panels: data.panels.filter((k) => wanted.has(k)).join(" ") });
    };
    const label = document.createElement("label");
    label.append(box, key);
    return label;
  }));
  const absent = new Set();
  const runs = groups.flatMap((g) => g.runs.map((run) => [g, run]));
  const thin = runs.length > 30 ? 1 : 1.8;
  for (const key of data.panels) {
    let chart = document.querySelector(`[data-panel="${CSS.escape(key)}"]`);
    if (!wanted.has(key)) { if (chart) { Plotly.purge(chart); chart.remove(); } continue; }
    if (!chart) {
      chart = Object.assign(document.createElement("div"), { className: "chart" });
      chart.dataset.panel = key;
      const next = data.panels.slice(data.panels.indexOf(key) + 1).map((k) => document.querySelector(`[data-panel="${CSS.escape(k)}"]`)).find(Boolean);
      $("curves").insertBefore(chart, next || null);
    }
    const traces = [];
    for (const [g, run] of runs) {
      const curve = run.curves[key];
      if (!curve) continue;
      const xs = along(run, curve[0]);
      if (!xs) { absent.add(run.name); continue; }
      const line = { name: plain(run.name), x: xs, mode: curve[0].length < 3 ? "lines+markers" : "lines",
        hovertemplate: `%{y:.5~g} at %{x:.5~g}<br>${plain(run.label)}` };
      if (Number(state.smooth) && curve[0].length > 3) {
        traces.push({ ...line, y: curve[1], line: { color: colour(g), width: 1 }, opacity: 0.2, hoverinfo: "skip", hovertemplate: null });
        traces.push({ ...line, y: smoothed(curve[1]), line: { color: colour(g), width: thin } });
      } else traces.push({ ...line, y: curve[1], line: { color: colour(g), width: thin }, opacity: runs.length > 30 ? 0.75 : 1 });
    }
    const top = state.logy ? null : cut(traces);
    const title = top === null ? plain(key) : `${plain(key)} <i>cut at ${shortest(top)}</i>`;
    Plotly.react(chart, traces, layout({ title: { text: title, font: { size: 13 }, x: 0.03, xanchor: "left" },
      xaxis: { title: { text: AXES[state.x] } }, yaxis: { type: state.logy ? "log" : "linear", ...(top === null ? { autorange: true } : { range: [lowest(traces), top] }) } }), CONFIG);
  }
  $("absent").textContent = absent.size ? `${absent.size} run(s) do not tell their ${AXES[state.x]}, and are left out here: ${[...absent].slice(0, 5).join(", ")}` : "";
}

// -- settings against results

function drawParallel(groups, colour) {
  const keys = [...settingKeys, data.sort].filter((key) => new Set(groups.map((g) => text(value(g, key)))).size > 1);
  const usable = groups.filter((g) => isNumber(g.metrics[data.sort]));
  $("parallel").hidden = usable.length < 2 || keys.length < 2;
  if ($("parallel").hidden) return;
  const dimensions = keys.map((key) => {
    const values = usable.map((g) => value(g, key));
    if (values.every(isNumber)) {
      const spread = Math.max(...values) / Math.min(...values);
      if (Math.min(...values) > 0 && spread > 30 && key !== data.sort) {
        const logs = values.map(Math.log10);
        const unique = [...new Set(values)].sort((a, b) => a - b);
        const ticks = unique.length <= 8 ? unique : [unique[0], unique[unique.length >> 1], unique[unique.length - 1]];
        return { label: plain(key), values: logs, tickvals: ticks.map(Math.log10), ticktext: ticks.map(shortest) };
      }
      const unique = [...new Set(values)];
      return { label: plain(key), values, ...(unique.length <= 6 && key !== data.sort ? { tickvals: unique, ticktext: unique.map(shortest) } : {}) };
    }
    const kinds = [...new Set(values.map(text))].sort();
    return { label: plain(key), values: values.map((v) => kinds.indexOf(text(v))), tickvals: kinds.map((_, i) => i),
      ticktext: kinds.map((k) => ending(k, 18) || "(none)") };
  });
  $("parcoords").style.minWidth = `${110 * keys.length}px`;
  const scores = usable.map((g) => g.metrics[data.sort]);
  const low = data.low.some((end) => data.sort.endsWith(end));
  Plotly.react("parcoords", [{ type: "parcoords", dimensions, labelangle: keys.length > 6 ? -20 : 0, labelside: "top",
    line: { color: scores, colorscale: low ? SCALE : SCALE.map(([at], i) => [at, SCALE[SCALE.length - 1 - i][1]]), showscale: true,
      colorbar: { title: { text: plain(data.sort) }, thickness: 12 } }, labelfont: { color: css("--text"), size: 12 },
    tickfont: { color: css("--text") }, rangefont: { color: css("--quiet") }, unselected: { line: { color: css("--line"), opacity: 0.4 } } }],
    { ...layout({}), margin: { l: 70, r: 60, t: keys.length > 6 ? 110 : 60, b: 30 } }, CONFIG);
}

function drawScatter(groups, colour) {
  const points = groups.filter((g) => isNumber(value(g, state.sx)) && isNumber(value(g, state.sy)));
  $("against").hidden = data.groups.length < 2 || !data.scatter.length;
  if ($("against").hidden) return;
  const xs = points.map((g) => value(g, state.sx));
  const wide = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 30;
  const errors = points.map((g) => g.std[state.sy] || 0);
  Plotly.react("scatter", [{ x: xs, y: points.map((g) => value(g, state.sy)), mode: points.length <= 12 ? "markers+text" : "markers",
    text: points.map((g) => plain(g.short)), textposition: "top center", textfont: { size: 11, color: css("--quiet") }, cliponaxis: false,
    customdata: points.map((g) => plain(g.label)), hovertemplate: "%{y:.5~g} at %{x:.5~g}<br>%{customdata}<extra></extra>",
    error_y: { type: "data", array: errors, visible: errors.some(Boolean), thickness: 1, color: css("--quiet") },
    marker: { size: 10, color: points.map(colour), line: { color: css("--page"), width: 1 } } }],
    layout({ xaxis: { title: { text: plain(state.sx) }, type: wide ? "log" : "linear" }, yaxis: { title: { text: plain(state.sy) } } }), CONFIG);
}

function drawFigures(groups) {
  const having = groups.filter((g) => has(g.figures, state.figure));
  $("pictures").hidden = !data.figures.length;
  $("figures").replaceChildren(...having.map((g) => {
    const figure = document.createElement("figure");
    const caption = Object.assign(document.createElement("figcaption"), { textContent: g.label });
    const image = Object.assign(document.createElement("img"), { src: g.figures[state.figure], alt: `${state.figure} of ${g.name}` });
    figure.append(caption, image);
    return figure;
  }));
}

// -- controls

function options(id, keys, names = {}) {
  $(id).replaceChildren(...keys.map((key) => new Option(names[key] || key, key)));
}
function set(changes) {
  Object.assign(state, changes);
  const changed = Object.entries(state).filter(([k, v]) => k in DEFAULTS && v !== DEFAULTS[k]);
  history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname + location.search);
  draw();
}
function draw() {
  if (state.theme) document.documentElement.dataset.theme = state.theme; else delete document.documentElement.dataset.theme;
  const groups = shown(), colour = colours(), wrong = unknownKey(words());
  $("wrong").textContent = wrong ? `no run has ${wrong}` : "";
  $("none").hidden = groups.length > 0;
  const count = groups.reduce((sum, g) => sum + g.runs.length, 0);
  $("about").textContent = `${count} of ${data.count} run${data.count === 1 ? "" : "s"} shown · ${data.about}`;
  document.body.dataset.shown = groups.length;
  drawLegend(colour);
  drawTable(colour);
  drawCurves(groups, colour);
  drawParallel(groups, colour);
  drawScatter(groups, colour);
  drawFigures(groups);
  document.body.dataset.ready = "true";
}
options("x", Object.keys(AXES), AXES);
options("colour", ["run", ...new Set([data.sort, ...settingKeys])], { run: "each run" });
options("sx", data.scatter);
options("sy", data.scatter);
options("figure", data.figures);
$("notes").replaceChildren(...data.notes.map((note) => Object.assign(document.createElement("div"), { textContent: note })));
for (const id of ["filter", "x", "colour", "smooth", "theme", "sx", "sy", "figure"]) {
  $(id).value = state[id];
  if ($(id).tagName === "SELECT" && $(id).selectedIndex < 0) $(id).value = state[id] = DEFAULTS[id];
  $(id).addEventListener("input", () => set({ [id]: $(id).value }));
}
$("logy").checked = Boolean(state.logy);
$("logy").onchange = () => set({ logy: $("logy").checked ? "1" : "" });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("hashchange", () => location.reload());  // a bookmark of this page, opened where it is open
draw();
