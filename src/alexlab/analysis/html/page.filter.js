"use strict";
// Values, how they are written, colours, and the filter. What is shown depends on `data` (written by page.py) and on
// `state`, which is stored in the address after the #.

// a run may have keys such as "constructor" and "__proto__", so objects are created without a prototype
const own = (v) => (v && typeof v === "object" && !Array.isArray(v) ? Object.assign(Object.create(null), v) : v);
const data = JSON.parse(document.getElementById("data").textContent, (_, v) => own(v));
const has = (object, key) => Object.hasOwn(object, key);
const $ = (id) => document.getElementById(id);
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f", "#9467bd", "#b5b837"];
const SCALE = [[0, "#e69f00"], [0.25, "#7fb21f"], [0.5, "#1f9a8a"], [0.75, "#3a6fb5"], [1, "#8a55c4"]];
const AXES = { step: "step", epoch: "epoch", images: "images seen", seconds: "training time (s)" };
const REPETITIONS = ["seed", "data.fold"];  // of a group of runs: "0,1,2"
const listed = (key) => key.replace(/[%\s]/g, encodeURIComponent);  // for lists that are separated by spaces
const DEFAULTS = { x: data.x, filter: "", colour: data.groups.length <= PALETTE.length ? "run" : data.sort, smooth: "0",
  logy: "", theme: "", sx: data.scatter[0], sy: data.sort, figure: data.figures[0] || "", off: "",
  panels: data.shown.map(listed).join(" "), by: "", down: "" };
const state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
if (!has(AXES, state.x)) state.x = DEFAULTS.x;

// -- values

const settingKeys = [...new Set(data.groups.flatMap((g) => Object.keys(g.settings)))];
// what is the same in all groups but one: such settings stand below the run's name, apart from the model
const isAlone = (key) => data.groups.length > 3 && !["model", "model.name"].includes(key) && data.groups.some((one) =>
  data.groups.filter((g) => text(value(g, key)) !== text(value(one, key))).length === data.groups.length - 1
  && new Set(data.groups.filter((g) => g !== one).map((g) => text(value(g, key)))).size === 1);
const isNumber = (v) => typeof v === "number" && Number.isFinite(v);
const isLow = (key) => data.low.includes(key);
const text = (v) => (v === undefined ? "" : v === null ? "null" : typeof v === "object" ? JSON.stringify(v) : String(v));
const value = (g, key) => has(g.settings, key) ? g.settings[key] : has(g.config, key) ? g.config[key]
  : has(g.metrics, key) ? g.metrics[key] : key === "status" ? g.status : key === "name" ? g.name : key === "title" ? g.title
  : has(g.facts, key) ? g.facts[key]
  : has(g.config, `choices.${key}`) ? g.config[`choices.${key}`] : undefined;
// the end of a long text: paths differ there
const ending = (s, most) => (s.length > most ? `…${s.slice(1 - most)}` : s);
// without the middle of a long name: the last overrides tell the jobs of a sweep apart
const middle = (s, most) => (s.length > most ? `${s.slice(0, most - 17)}…${s.slice(-16)}` : s);
const leaf = (s) => (/^[\w.~-]*\//.test(s) ? s.replace(/\/+$/, "").split("/").pop() : s);  // the last part of a path
const shortest = (v) => Math.abs(v) >= 1e9 ? `${(v / 1e9).toPrecision(4)} G` : Math.abs(v) >= 1e6 ? `${(v / 1e6).toPrecision(4)} M`
  : v !== 0 && Math.abs(v) < 1e-3 ? String(Number(v.toPrecision(3))) : String(Number(v.toPrecision(Math.abs(v) >= 1e4 ? 7 : 4)));
function writer(key) {  // returns (mean, std) => text, with equal decimals in all rows
  const all = data.groups.map((g) => g.metrics[key]).filter(isNumber).map(Math.abs).sort((a, b) => a - b);
  const usual = all[all.length >> 1] || 0;
  const whole = all.every(Number.isInteger) && !data.groups.some((g) => g.std[key]);
  const timed = ["seconds", "images_per_second"].includes(key);
  const [unit, name] = timed || usual < 1e5 ? [1, ""] : usual < 1e9 ? [1e6, " M"] : [1e9, " G"];
  const places = unit > 1 ? 2 : timed ? (usual >= 100 ? 0 : 1) : whole || usual >= 1000 ? 0 : usual >= 100 ? 1 : usual >= 10 ? 2 : 4;
  const tiny = usual > 0 && usual < 1e-3;
  const one = (v) => (tiny || Math.abs(v) >= 1e7 * unit ? v.toExponential(2) : (v / unit).toFixed(places));
  return (mean, std) => one(mean) + (std ? `±${one(std)}` : "") + name;
}
// Plotly interprets some HTML in its texts
const plain = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// -- filter: the syntax of where=, and plain text that a name or a setting must contain; spaces mean `and`

const SIGNS = { "==": (a, b) => a === b, "!=": (a, b) => a !== b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b,
  "=": (a, b) => a === b, ">": (a, b) => a > b, "<": (a, b) => a < b, "~": (a, b) => a.includes(b) };
const CONDITION = /^([\w./@-]+?)(==|!=|>=|<=|=|>|<|~)(.+)$/;
const unquoted = (s) => (/^(['"]).*\1$/.test(s) ? s.slice(1, -1) : s);
const bare = (v) => text(v).replace(/[\s'"]/g, "").toLowerCase();
function parsed(filter) {  // a list of alternatives, each a list of conditions and texts
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
  const all = [g.title, ...g.runs.map((run) => run.name), g.status, ...Object.entries(g.settings).map(([k, v]) => `${k}=${text(v)}`)].join(" ").toLowerCase();
  return ways.some((way) => way.every(({ word, key, sign, wanted }) => {
    if (word !== undefined) return all.includes(word);
    const got = value(g, key), number = Number(wanted);
    if (REPETITIONS.includes(key) && typeof got === "string")  // of a group: any of its seeds or folds
      return got.split(",").some((one) => (sign === "~" ? one.includes(wanted) : SIGNS[sign](Number(one), number)));
    if (key === "name") return g.runs.some((run) => SIGNS[sign](bare(run.name), bare(wanted)));
    if (isNumber(got) && !Number.isNaN(number) && sign !== "~") return SIGNS[sign](got, number);
    if (">=<=".includes(sign) && sign !== "=" && sign !== "==") return false;
    return SIGNS[sign](bare(got === undefined ? null : got), bare(wanted.toLowerCase() === "none" ? "null" : wanted));
  }));
}
// the same answers to mistakes as where= gives
function mistake(ways) {
  const odd = ways.flat().map((condition) => condition.word).find((word) => word && /^[&|()]+|[=<>~]$|^\(.*[=<>~]/.test(word));
  if (odd) return `\`${odd}\` is not a condition: write KEY SIGN VALUE, joined with \`and\` or \`or\`, without brackets.`;
  for (const { key, sign, wanted } of ways.flat().filter((condition) => condition.key)) {
    const known = data.groups.map((g) => value(g, key)).filter((v) => v !== undefined);
    if (!known.length) return `no run has ${key}.${nearest(key)}`;
    if (/&&|\|\||[&|]\s*[\w./@-]+\s*(?:[=<>~]|!=)/.test(wanted)) return `join conditions with \`and\` or \`or\`, not as in \`${key}${sign}${wanted}\`.`;
    const number = wanted.trim() !== "" && !Number.isNaN(Number(wanted)), values = known.filter((v) => v !== null);
    const words = number ? (REPETITIONS.includes(key) || values.some(isNumber) ? undefined : values[0]) : wanted;
    if ([">", "<", ">=", "<="].includes(sign) && words !== undefined)
      return `\`${text(words)}\` is not a number: compare text with =, != or ~ (contains).`;
  }
  return "";
}
function nearest(key) {
  const known = new Set([...settingKeys, ...data.groups.flatMap((g) => [...Object.keys(g.metrics), ...Object.keys(g.config), ...Object.keys(g.facts)]), "status", "name", "title"]
    .map((k) => k.replace(/^choices\./, "")));
  const last = (k) => k.split(/[./]/).pop();
  const pairs = (s) => new Set([...s.slice(1)].map((letter, i) => s[i] + letter));
  const shared = (k) => { const [a, b] = [pairs(key), pairs(k)]; return 2 * [...a].filter((pair) => b.has(pair)).length / (a.size + b.size || 1); };
  const same = [...known].filter((k) => last(k) === last(key));
  const near = same.length ? same : [...known].filter((k) => shared(k) >= 0.5).sort((a, b) => shared(b) - shared(a));
  return near.length ? ` Did you mean ${near.slice(0, 3).join(" or ")}?` : " Keys are status, name, metrics and settings.";
}
const off = () => new Set(state.off.split(" ").filter(Boolean).map(Number));
const matching = () => data.groups.filter((g) => keeps(g, parsed(state.filter)));
const shown = () => { const hidden = off(); return matching().filter((g) => !hidden.has(g.id)); };

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
    // by rank: learning rates and times differ by orders of magnitude, accuracies do not
    const sorted = [...new Set(numbers)].sort((a, b) => (isLow(key) ? a - b : b - a));
    return (g) => { const v = value(g, key); return isNumber(v) ? mixed(sorted.indexOf(v) / Math.max(1, sorted.length - 1)) : "#8a8a8a"; };
  }
  const kinds = [...new Set(values.map(text))];
  return (g) => PALETTE[kinds.indexOf(text(value(g, key))) % PALETTE.length];
}
