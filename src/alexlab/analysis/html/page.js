"use strict";
// Drawing and controls. The data, the filter and the colours are in page.filter.js.

// -- the legend

function drawLegend(colour) {
  const key = state.colour, groups = shown();
  const entry = (color, label) => {
    const item = document.createElement("span"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color;
    item.append(swatch, ` ${label}`);
    return item;
  };
  if (key === "run") { $("legend").replaceChildren(); return; }  // the table shows the colours
  const seen = new Map();
  for (const g of groups) seen.set(colour(g), value(g, key));
  const order = [...seen].sort(([, a], [, b]) => (isNumber(a) && isNumber(b) ? a - b : text(a).localeCompare(text(b))));
  const few = order.length <= 12 ? order : [0, 0.25, 0.5, 0.75, 1].map((p) => order[Math.round(p * (order.length - 1))]);
  const write = data.columns.includes(key) ? writer(key) : shortest;
  $("legend").replaceChildren(`${key}: `, ...few.map(([color, v]) => entry(color, isNumber(v) ? write(v) : ending(text(v), 40) || "(none)")));
}

// -- the table

// the metric that the page is sorted by follows the name, so that it is visible however many settings differ
const aloneKeys = settingKeys.filter(isAlone);
const ORDER = ["title", ...data.columns.slice(0, 1), ...(data.groups.every((g) => g.status === "finished") ? [] : ["status"]),
  ...settingKeys.filter((key) => !aloneKeys.includes(key)), ...data.columns.slice(1)];
const TITLES = { title: "run", images_per_second: "images/s" };
const WRITERS = new Map(data.columns.map((key) => [key, writer(key)]));

function drawTable(colour) {
  const head = document.createElement("tr");
  for (const key of ORDER) {
    const cell = document.createElement("th");
    const arrow = state.by === key ? (state.down ? " ▾" : " ▴") : "";
    cell.textContent = (has(TITLES, key) ? TITLES[key] : WRITERS.has(key) && key.startsWith("val/") ? `best.ckpt\n${key}`
      : settingKeys.includes(key) ? key.replace(/\.(?=[^.]*$)/, ".\n").replace(/^(\w{4,}?_)(\w{5,})$/, "$1\n$2") : key) + arrow;
    cell.tabIndex = 0;
    cell.title = `${key}: sort`;
    if (WRITERS.has(key)) cell.className = "number";
    cell.onclick = () => {
      const again = state.by === key;
      set({ by: key, down: again ? (state.down ? "" : "1") : WRITERS.has(key) && !isLow(key) ? "1" : "" });
    };
    cell.onkeydown = (event) => { if (event.key === "Enter") cell.onclick(); };
    head.append(cell);
  }
  $("runs").tHead.replaceChildren(head);
  const rows = matching();
  if (state.by) {
    const sign = state.down ? -1 : 1;
    const absent = (v) => v === undefined || v === null;
    const of = (g) => (WRITERS.has(state.by) ? g.metrics[state.by] : value(g, state.by));
    rows.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (absent(x) || absent(y)) return absent(x) - absent(y);
      return sign * (isNumber(x) && isNumber(y) ? x - y : text(x).localeCompare(text(y), undefined, { numeric: true }));
    });
  }
  const hidden = off();
  const best = new Map(data.columns.map((key) => {
    const numbers = rows.map((g) => g.metrics[key]).filter(isNumber);
    return [key, new Set(numbers).size > 1 && !["parameters", "seconds"].includes(key) ? (isLow(key) ? Math.min(...numbers) : Math.max(...numbers)) : undefined];
  }));
  $("runs").tBodies[0].replaceChildren(...rows.map((g) => {
    const row = document.createElement("tr");
    row.className = hidden.has(g.id) ? "off" : "";
    for (const key of ORDER) {
      const cell = row.insertCell();
      if (key === "title") drawName(cell, g, hidden, colour);
      else if (key === "status") {
        cell.textContent = g.status;
        if (g.status === "failed") cell.className = "failed";
      } else if (WRITERS.has(key)) {
        const number = g.metrics[key];
        cell.className = number !== undefined && number === best.get(key) ? "number best" : "number";
        cell.textContent = isNumber(number) ? WRITERS.get(key)(number, g.std[key]) + (has(g.fewer, key) ? ` (${g.fewer[key]})` : "") : "";
        if (has(g.intervals, key)) cell.title = `95 % interval of the mean: ${g.intervals[key].map((v) => Number(v.toPrecision(4))).join(" to ")}`;
      } else {
        const setting = g.settings[key];
        cell.title = text(setting);
        cell.textContent = isNumber(setting) ? String(Number(setting.toPrecision(6))) : ending(text(setting), 40);
      }
    }
    return row;
  }));
}
function drawName(cell, g, hidden, colour) {
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(g.id) });
  box.setAttribute("aria-label", `show ${g.title}`);
  box.onchange = () => {
    if (box.checked) hidden.delete(g.id); else hidden.add(g.id);
    set({ off: [...hidden].join(" ") });
  };
  const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
  swatch.style.background = colour(g);
  cell.append(box, swatch, ` ${middle(g.title, 30)}`);
  const alone = (key) => data.groups.every((other) => other === g || text(value(other, key)) !== text(value(g, key)));
  const more = aloneKeys.filter((key) => has(g.settings, key) && alone(key)).map((key) => `${key}=${text(g.settings[key])}`);
  if (more.length) cell.append(Object.assign(document.createElement("div"), { className: "note", textContent: more.join(" ") }));
  cell.title = [g.title, ...more, ...g.paths].join("\n");
}
// shadows at the sides to which something can be scrolled
for (const held of document.querySelectorAll(".edged")) {
  const inner = held.firstElementChild;
  const edges = () => {
    held.classList.toggle("before", inner.scrollLeft > 1);
    held.classList.toggle("after", inner.scrollWidth - inner.clientWidth - inner.scrollLeft > 1);
    held.style.setProperty("--bar", `${inner.offsetWidth - inner.clientWidth}px`);
  };
  inner.addEventListener("scroll", edges, { passive: true });
  const watch = new ResizeObserver(edges);
  watch.observe(inner);
  watch.observe(inner.firstElementChild);
}

// -- curves

function between(x, xs, ys) {  // linear interpolation; null outside the known range
  if (!xs.length || x < xs[0] || x > xs[xs.length - 1]) return null;
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
  const part = xs[high] === xs[low] ? 0 : (x - xs[low]) / (xs[high] - xs[low]);
  return ys[low] + part * (ys[high] - ys[low]);
}
function along(run, steps) {  // steps converted to the chosen axis; null if the run does not record it
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
// a diverged run would squeeze the others into a line at the bottom of a linear axis
function hasDiverged(traces) {
  const ys = traces.flatMap((t) => t.y).filter((y) => y !== null).sort((a, b) => a - b);
  return ys[0] > 0 && ys[ys.length - 1] > 20 * ys[Math.floor(0.9 * (ys.length - 1))];
}
function wholeEpochs(traces) {  // no ticks at 1.2 and 1.4 epochs
  const most = Math.max(...traces.map((t) => t.x[t.x.length - 1] ?? 0)), least = Math.min(...traces.map((t) => t.x[0] ?? 0));
  return state.x === "epoch" && most >= 1 && most - least <= 6 ? { tick0: 0, dtick: 1 } : {};
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function layout(more) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12 },
    margin: { l: 52, r: 24, t: 34, b: 48 }, showlegend: false, autosize: true,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") }, hovermode: "closest", ...more,
    hoverlabel: { namelength: -1, align: "left" }, xaxis: { ...axis, ...more.xaxis, title: { standoff: 6, ...more.xaxis?.title } }, yaxis: { ...axis, ...more.yaxis } };
}
// without Plotly's button that sends a chart to its cloud
const CONFIG = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "", displayModeBar: "hover", responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function drawCurves(groups, colour) {
  const wanted = new Set(state.panels.split(" ").filter(Boolean));  // encoded by `listed`
  $("choose").replaceChildren(...data.panels.map((key) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: wanted.has(listed(key)) });
    box.onchange = () => {
      if (box.checked) wanted.add(listed(key)); else wanted.delete(listed(key));
      set({ panels: data.panels.map(listed).filter((k) => wanted.has(k)).join(" ") });
    };
    const label = document.createElement("label");
    label.append(box, key);
    return label;
  }));
  const absent = new Set(), empty = [];
  const runs = groups.flatMap((g) => g.runs.map((run) => [g, run]));
  const thin = runs.length > 30 ? 1 : 1.8;
  for (const key of data.panels) {
    const traces = [];
    for (const [g, run] of wanted.has(listed(key)) ? runs : []) {
      const curve = run.curves[key];
      if (!curve) continue;
      const xs = along(run, curve[0]);
      if (!xs) { absent.add(run.name); continue; }
      // names are not written into the template: Plotly would fill in a `%{y}` of a name
      const line = { x: xs, mode: curve[0].length < 3 ? "lines+markers" : "lines",
        meta: [plain(run.label)], hovertemplate: "%{y:.5~g} at %{x:.5~g}<br>%{meta[0]}<extra></extra>" };
      if (Number(state.smooth) && curve[0].length > 3) {
        traces.push({ ...line, y: curve[1], line: { color: colour(g), width: 1 }, opacity: 0.2, hoverinfo: "skip", hovertemplate: null });
        traces.push({ ...line, y: smoothed(curve[1]), line: { color: colour(g), width: thin } });
      } else traces.push({ ...line, y: curve[1], line: { color: colour(g), width: thin }, opacity: runs.length > 30 ? 0.75 : 1 });
    }
    let chart = document.querySelector(`[data-panel="${CSS.escape(key)}"]`);
    if (wanted.has(listed(key)) && !traces.length) empty.push(key);
    if (!traces.length) { if (chart) chart.hidden = true; continue; }  // no empty axes
    if (!chart) {
      chart = Object.assign(document.createElement("div"), { className: "chart" });
      chart.dataset.panel = key;
      const next = data.panels.slice(data.panels.indexOf(key) + 1).map((k) => document.querySelector(`[data-panel="${CSS.escape(k)}"]`)).find(Boolean);
      $("curves").insertBefore(chart, next || null);
    }
    const again = chart.hidden;
    chart.hidden = false;
    const isLog = Boolean(state.logy) || hasDiverged(traces);
    const title = isLog ? `${plain(key)} <i>log axis</i>` : plain(key);
    Plotly.react(chart, traces, layout({ title: { text: title, font: { size: 13 }, x: 0.03, xanchor: "left" },
      xaxis: { title: { text: AXES[state.x] }, ...wholeEpochs(traces) }, yaxis: { type: isLog ? "log" : "linear", autorange: true } }), CONFIG);
    if (again) Plotly.Plots.resize(chart);  // the window may have been resized meanwhile
  }
  const unknown = absent.size ? `Not drawn, because ${AXES[state.x]} is unknown: ${[...absent].slice(0, 5).join(", ")}. ` : "";
  $("absent").textContent = unknown + (empty.length ? `No run shown has a curve of ${empty.join(", ")}.` : "");
}

// -- settings against results

function drawParallel(groups, colour) {
  const of = (g, key) => (key === data.sort ? g.metrics[key] : value(g, key));
  const keys = [...settingKeys, data.sort].filter((key) => new Set(groups.map((g) => text(of(g, key)))).size > 1);
  const usable = groups.filter((g) => isNumber(g.metrics[data.sort]));
  $("parallel").hidden = usable.length < 2 || keys.length < 2;
  if ($("parallel").hidden) return;
  const dimensions = keys.map((key) => {
    const values = usable.map((g) => of(g, key));
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
  const first = Math.max(0, ...(dimensions[0].ticktext || []).map((words) => words.length));
  const scores = usable.map((g) => g.metrics[data.sort]);
  Plotly.react("parcoords", [{ type: "parcoords", dimensions, labelangle: keys.length > 6 ? -20 : 0, labelside: "top",
    line: { color: scores, colorscale: isLow(data.sort) ? SCALE : SCALE.map(([at], i) => [at, SCALE[SCALE.length - 1 - i][1]]), showscale: true,
      colorbar: { title: { text: plain(data.sort) }, thickness: 12 } }, labelfont: { color: css("--text"), size: 12 },
    tickfont: { color: css("--text") }, rangefont: { color: css("--quiet") }, unselected: { line: { color: css("--line"), opacity: 0.4 } } }],
    { ...layout({}), paper_bgcolor: css("--page"), margin: { l: Math.max(70, 14 + 6 * first), r: 60, t: keys.length > 6 ? 110 : 60, b: 30 } }, CONFIG);
}

// short labels for points: the settings that differ among them, else the parts of their names that differ
function labels(points) {
  const most = 36, once = (words) => words.every((w) => w && w.length <= most) && new Set(words).size === words.length;
  const differ = settingKeys.filter((key) => ![state.sx, state.sy].includes(key) && new Set(points.map((g) => text(g.settings[key]))).size > 1);
  const word = (g, key) => !has(g.settings, key) ? "" : typeof g.settings[key] === "string" && !REPETITIONS.includes(key) ? leaf(g.settings[key])
    : `${key.split(".").pop()}=${isNumber(g.settings[key]) ? shortest(g.settings[key]) : text(g.settings[key])}`;
  for (const keys of [differ.filter((key) => !REPETITIONS.includes(key)), differ]) {
    const words = points.map((g) => keys.map((key) => word(g, key)).filter(Boolean).join(" "));
    if (once(words)) return words;
  }
  const names = points.map((g) => g.title);
  let shared = names.length > 1 ? Math.min(...names.map((name) => { let i = 0; while (i < name.length && name[i] === names[0][i]) i++; return i; })) : 0;
  while (shared > 0 && /[^\s/_-]/.test(names[0][shared - 1])) shared--;  // whole words
  return names.map((name) => ending(shared ? `…${name.slice(shared)}` : name, most));
}
// a label that would overlap another one or a point, or be cut off, is hidden: hovering shows it
function declutter() {
  const rect = (node) => node.getBoundingClientRect();
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const box = rect($("scatter")), labels = [];
  const points = [...$("scatter").querySelectorAll(".scatterlayer .point")].map(rect);
  $("scatter").querySelectorAll(".scatterlayer .textpoint").forEach((label, i) => {
    const here = rect(label);
    const clear = here.left > box.left && here.right < box.right && here.top > box.top
      && !points.some((point, k) => k !== i && meet(here, point)) && !labels.some((other) => meet(here, other));
    label.style.visibility = clear ? "" : "hidden";
    if (clear) labels.push(here);
  });
}

function drawScatter(groups, colour) {
  const points = groups.filter((g) => isNumber(value(g, state.sx)) && isNumber(value(g, state.sy)));
  $("against").hidden = data.groups.length < 2 || !data.scatter.length || !groups.length;
  if ($("against").hidden) return;
  $("scatter").hidden = !points.length;
  $("pointless").hidden = points.length > 0;
  if (!points.length) return;
  const xs = points.map((g) => value(g, state.sx));
  const wide = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 30;
  const at = wide ? Math.log : Number, middle = (at(Math.min(...xs)) + at(Math.max(...xs))) / 2;
  const errors = points.map((g) => g.std[state.sy] || 0);
  Plotly.react("scatter", [{ x: xs, y: points.map((g) => value(g, state.sy)), mode: points.length <= 30 ? "markers+text" : "markers",
    text: labels(points).map(plain), textposition: xs.map((x) => (at(x) > middle ? "top left" : "top right")), textfont: { size: 11, color: css("--quiet") }, cliponaxis: false,
    customdata: points.map((g) => plain(g.label)), hovertemplate: "%{y:.5~g} at %{x:.5~g}<br>%{customdata}<extra></extra>",
    error_y: { type: "data", array: errors, visible: errors.some(Boolean), thickness: 1, color: css("--quiet") },
    marker: { size: 10, color: points.map(colour), line: { color: css("--page"), width: 1 } } }],
    // the range makes room for the labels of points, so margins that follow the range would change it, again and again
    layout({ margin: { l: 74, r: 24, t: 34, b: 48 }, xaxis: { title: { text: plain(state.sx) }, type: wide ? "log" : "linear", automargin: false },
      yaxis: { title: { text: plain(state.sy) }, automargin: false } }), CONFIG);
  $("scatter").removeAllListeners("plotly_afterplot");
  $("scatter").on("plotly_afterplot", declutter);
  declutter();
}

function drawFigures(groups) {
  const having = groups.filter((g) => has(g.figures, state.figure));
  $("pictures").hidden = !data.figures.length || !groups.length;
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
  $(id).replaceChildren(...keys.map((key) => new Option(has(names, key) ? names[key] : key, key)));
}
function set(changes) {
  Object.assign(state, changes);
  const changed = Object.entries(state).filter(([k, v]) => has(DEFAULTS, k) && v !== DEFAULTS[k]);
  history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname + location.search);
  draw();
}
function draw() {
  if (state.theme) document.documentElement.dataset.theme = state.theme; else delete document.documentElement.dataset.theme;
  const groups = shown(), colour = colours(), wrong = mistake(parsed(state.filter));
  $("wrong").textContent = wrong;
  $("none").hidden = groups.length > 0 || Boolean(wrong);
  $("lines").hidden = !data.panels.length || !groups.length;
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
$("asked").textContent = data.asked;
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
addEventListener("hashchange", () => location.reload());  // a bookmark of this page was opened in the same tab
draw();
