"use strict";
// Draws the report from the JSON in #data. No library: charts are SVG made here.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const COLOURS = ["#1c7ed6", "#e8590c", "#2b8a3e", "#ae3ec9", "#b08900", "#0c8599", "#c2255c", "#5f3dc4"];
const PHASES = { data_wait_s: "waiting for data", "time/forward_s": "forward", "time/backward_s": "backward",
  "time/communication_s": "communication", "time/optimizer_s": "optimizer" };
const PHASE_COLOURS = ["#f08c00", "#1c7ed6", "#6741d9", "#c2255c", "#2f9e44"];
const state = { axis: "step", smooth: 0.6, hidden: new Set() };
const AXIS_NAMES = { step: "step", epoch: "epoch", images_seen: "images seen", hours: "hours of computing" };
const redraws = [];

// ---- small helpers -------------------------------------------------------------------------------------------
function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size >= 100) return String(Math.round(value * 10) / 10);
  if (size >= 0.001 || size === 0) return String(Number(value.toPrecision(4)));
  return value.toExponential(2);
}
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) {
    found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  }
  return found;
}
const tip = html("div", { class: "tip" });
document.body.append(tip);
function showTip(event, lines) {
  tip.replaceChildren(...lines.map((line) => html("div", {}, line)));
  tip.style.opacity = 1;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 4) + "px";
}
function hideTip() { tip.style.opacity = 0; }
function shown(run) { return !state.hidden.has(run); }
function section(title, text) {
  const main = document.getElementById("main");
  main.append(html("h2", {}, title));
  if (text) main.append(html("p", { class: "muted" }, text));
  const grid = html("div", { class: "grid" });
  main.append(grid);
  return grid;
}
function card(grid, title, text) {
  const box = html("div", { class: "card" }, html("h3", {}, title));
  if (text) box.append(html("p", { class: "muted" }, text));
  const body = html("div");
  box.append(body);
  grid.append(box);
  return body;
}
function smoothed(values, amount) {
  let average = null, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    weight = weight * amount + (1 - amount);
    average = (average === null ? 0 : average * amount) + (1 - amount) * value;
    return average / weight;
  });
}

// ---- line charts ---------------------------------------------------------------------------------------------
// lines: [{ run, metric, dash, dots, raw }], one for each run and metric that exists
function lineChart(body, metrics, options = {}) {
  const draw = () => {
    body.replaceChildren();
    const lines = [];
    RUNS.forEach((run, index) => metrics.forEach((metric) => {
      const series = run.series[metric.name];
      if (!series || !shown(index)) return;
      const axis = state.axis === "epoch" && !metric.name.includes(":") ? "step" : state.axis;
      let xs = series[state.axis];
      if (axis === "step" && state.axis === "epoch") xs = series.step.map((step) => step / run.steps_per_epoch);
      else if (state.axis === "epoch") xs = series.epoch.map((epoch) => epoch + 1);
      if (!xs.some((x) => x !== null)) xs = series.step;
      const smooth = !metric.name.includes(":") && !options.exact && series.y.length > 20;
      lines.push({ run, colour: metric.colour || COLOURS[index % COLOURS.length], label: metric.label, xs, raw: series.y,
        ys: smooth ? smoothed(series.y, state.smooth) : series.y, dash: metric.dash, dots: series.y.length < 16, smooth,
        width: metric.dash ? 1.6 : 2, scale: metric.scale || 1 });
    }));
    if (!lines.length) { body.append(html("p", { class: "muted" }, "not shown")); return; }
    for (const line of lines) {
      line.ys = line.ys.map((y) => y === null ? null : y * line.scale);
      line.raw = line.raw.map((y) => y === null ? null : y * line.scale);
    }
    const finite = lines.flatMap((line) => line.ys.filter((y) => y !== null));
    const across = lines.flatMap((line) => line.xs.filter((x) => x !== null));
    let low = Math.min(...finite), high = Math.max(...finite);
    if (options.zero) low = Math.min(0, low);
    if (high === low) { high += Math.abs(high) * 0.1 || 1; low -= options.zero && low === 0 ? 0 : Math.abs(low) * 0.1 || 1; }
    const first = Math.min(...across), last = Math.max(...across) === first ? first + 1 : Math.max(...across);
    const width = 400, height = 230, left = 46, right = 8, top = 10, bottom = 32;
    const px = (x) => left + (x - first) / (last - first) * (width - left - right);
    const py = (y) => top + (1 - (y - low) / (high - low)) * (height - top - bottom);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": body.parentNode.firstChild.textContent });
    for (const y of ticks(low, high, 5)) {
      picture.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: py(y), y2: py(y) }));
      picture.append(svg("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, number(y)));
    }
    for (const x of ticks(first, last, 5)) {
      picture.append(svg("text", { x: px(x), y: height - bottom + 15, "text-anchor": "middle" }, number(x)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    picture.append(svg("text", { x: width - right, y: height - 2, "text-anchor": "end" }, AXIS_NAMES[state.axis]));
    const path = (line, ys) => {
      let out = "", pen = false;
      ys.forEach((y, i) => {
        if (y === null || line.xs[i] === null) { pen = false; return; }
        out += `${pen ? "L" : "M"}${px(line.xs[i]).toFixed(1)} ${Math.max(-20, Math.min(py(y), height + 20)).toFixed(1)}`;
        pen = true;
      });
      return out;
    };
    for (const line of lines) {
      if (line.smooth && state.smooth > 0) {
        const faint = line.raw.map((y) => y === null ? null : Math.min(Math.max(y, low), high));
        picture.append(svg("path", { d: path(line, faint), fill: "none", stroke: line.colour, "stroke-opacity": 0.22, "stroke-width": 1 }));
      }
      picture.append(svg("path", { d: path(line, line.ys), fill: "none", stroke: line.colour, "stroke-width": line.width,
        "stroke-dasharray": line.dash || "none", "stroke-linejoin": "round" }));
      if (line.dots) line.ys.forEach((y, i) => y !== null && picture.append(
        svg("circle", { cx: px(line.xs[i]), cy: py(y), r: 2.6, fill: line.colour })));
    }
    const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
    picture.append(cross);
    picture.addEventListener("mousemove", (event) => {
      const box = picture.getBoundingClientRect();
      const x = first + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (last - first);
      let nearest = null;
      const rows = lines.map((line) => {
        let best = -1;
        line.xs.forEach((at, i) => { if (at !== null && line.raw[i] !== null && (best < 0 || Math.abs(at - x) < Math.abs(line.xs[best] - x))) best = i; });
        if (best < 0) return null;
        if (nearest === null || Math.abs(line.xs[best] - x) < Math.abs(nearest - x)) nearest = line.xs[best];
        return `${RUNS.length > 1 ? line.run.short + " " : ""}${line.label || ""} ${number(line.raw[best])}`;
      }).filter(Boolean);
      cross.setAttribute("x1", px(nearest)); cross.setAttribute("x2", px(nearest)); cross.setAttribute("visibility", "visible");
      showTip(event, [`${AXIS_NAMES[state.axis]} ${number(nearest)}`, ...rows]);
    });
    picture.addEventListener("mouseleave", () => { cross.setAttribute("visibility", "hidden"); hideTip(); });
    body.append(picture);
    const labels = metrics.filter((metric) => metric.label && lines.some((line) => line.label === metric.label));
    if (labels.length > 1 || (labels.length && options.key)) body.append(html("div", { class: "key" }, ...labels.map((metric) => {
      const sample = svg("svg", { viewBox: "0 0 22 6", style: "width:22px" });
      sample.append(svg("line", { x1: 0, x2: 22, y1: 3, y2: 3, stroke: metric.colour || (RUNS.length === 1 ? COLOURS[0] : "currentColor"),
        "stroke-width": 2, "stroke-dasharray": metric.dash || "none" }));
      return html("span", {}, sample, metric.label);
    })));
  };
  redraws.push(draw);
  draw();
}
function chart(grid, title, metrics, options = {}) {
  metrics = metrics.map((metric) => typeof metric === "string" ? { name: metric } : metric);
  if (RUNS.some((run) => metrics.some((metric) => run.series[metric.name]))) lineChart(card(grid, title, options.text), metrics, options);
}

// ---- heat maps -----------------------------------------------------------------------------------------------
const SCALE = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
function heat(share) {
  const at = Math.max(0, Math.min(1, share)) * (SCALE.length - 1), low = Math.floor(at), high = Math.min(low + 1, SCALE.length - 1);
  const mix = SCALE[low].map((value, i) => Math.round(value + (SCALE[high][i] - value) * (at - low)));
  return `rgb(${mix.join(",")})`;
}
// rows: layer names; columns: labels; value(r, c) → number or null
function heatMap(body, rows, columns, value, options = {}) {
  body.replaceChildren();
  const values = rows.flatMap((_, r) => columns.map((_, c) => value(r, c))).filter((v) => v !== null && v !== undefined);
  const view = options.log ? (v) => Math.log10(Math.max(v, 1e-12)) : (v) => v;
  const low = options.low !== undefined ? options.low : Math.min(...values.map(view));
  const high = options.high !== undefined ? options.high : Math.max(...values.map(view), low + 1e-9);
  const longest = Math.max(...rows.map((row) => row.length));
  const cell = Math.max(9, Math.min(17, 620 / rows.length)), left = Math.min(150, 12 + 5.4 * longest), bottom = 34, top = 2, width = 400, bar = 44;
  const across = (width - left - bar) / columns.length;
  const height = top + rows.length * cell + bottom;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": body.parentNode.firstChild.textContent });
  const every = Math.ceil(columns.length / 8);
  rows.forEach((row, r) => {
    picture.append(svg("text", { x: left - 6, y: top + r * cell + cell / 2 + 3.5, "text-anchor": "end", style: "font-size:9.5px" }, row));
    columns.forEach((column, c) => {
      const v = value(r, c);
      const box = svg("rect", { x: left + c * across, y: top + r * cell, width: across + 0.4, height: cell + 0.4,
        fill: v === null || v === undefined ? "none" : heat((view(v) - low) / (high - low || 1)) });
      box.addEventListener("mousemove", (event) => showTip(event, [row, `${options.column} ${column}`, `${options.value} ${number(v)}`]));
      box.addEventListener("mouseleave", hideTip);
      picture.append(box);
    });
  });
  columns.forEach((column, c) => {
    if (c % every === 0) picture.append(svg("text", { x: left + (c + 0.5) * across, y: top + rows.length * cell + 13, "text-anchor": "middle" }, number(column)));
  });
  picture.append(svg("text", { x: left + columns.length * across, y: height - 6, "text-anchor": "end" }, options.column));
  const tall = Math.min(120, rows.length * cell), barLeft = width - bar + 10;
  for (let i = 0; i < 30; i += 1) picture.append(svg("rect", { x: barLeft, y: top + i * tall / 30, width: 8, height: tall / 30 + 0.5, fill: heat(1 - i / 29) }));
  const label = (v) => number(options.log ? Math.pow(10, v) : v);
  picture.append(svg("text", { x: barLeft + 11, y: top + 9, style: "font-size:9.5px" }, label(high)));
  picture.append(svg("text", { x: barLeft + 11, y: top + tall, style: "font-size:9.5px" }, label(low)));
  body.append(picture);
}
function healthMaps(grid) {
  RUNS.forEach((run, index) => {
    if (!run.health.length) return;
    const layers = Object.keys(run.health[0].layers), name = RUNS.length > 1 ? ` · ${run.short}` : "";
    const steps = run.health.map((sample) => sample.step);
    const rates = run.health.flatMap((sample) => layers.flatMap((layer) => sample.layers[layer] ? sample.layers[layer].firing_rate_t : []));
    const most = Math.max(...rates, 1e-6);
    const body = card(grid, `Firing rate, layer × time-step${name}`, "share of neurons that fire; move the slider through the training");
    const picture = html("div"), at = html("span");
    picture.setAttribute("data-map", "rates");
    const slider = html("input", { type: "range", min: 0, max: run.health.length - 1, value: run.health.length - 1, "aria-label": "step of training" });
    body.append(html("div", {}, picture), html("div", { class: "slider" }, slider, at));
    const draw = () => {
      const sample = run.health[slider.value];
      const wide = sample.layers[layers[0]].firing_rate_t.length;
      at.textContent = `step ${sample.step}`;
      heatMap(picture, layers, Array.from({ length: wide }, (_, t) => t),
        (r, t) => sample.layers[layers[r]].firing_rate_t[t], { low: 0, high: most, column: "time-step", value: "firing rate" });
    };
    slider.addEventListener("input", draw);
    draw();
    const over = (title, text, pick, options) => heatMap(card(grid, title + name, text), layers, steps, pick, { column: "step", ...options });
    over("Firing rate over the training", "mean over the time-steps", (r, c) => run.health[c].layers[layers[r]].firing_rate, { low: 0, value: "firing rate" });
    over("Dead channels", "share of channels that never fired in the measured batch", (r, c) => run.health[c].layers[layers[r]].dead_share, { low: 0, high: 1, value: "dead" });
    over("Gradient flow", "share of membranes where the surrogate passes at least a tenth of its largest gradient",
      (r, c) => run.health[c].layers[layers[r]].active_share, { low: 0, value: "in the window" });
    const weights = Object.keys(run.health[0].gradients);
    if (weights.length) heatMap(card(grid, "Gradient norm" + name, "of each weight layer, logarithmic"), weights, steps,
      (r, c) => run.health[c].gradients[weights[r]], { log: true, column: "step", value: "norm" });
  });
}

// ---- time of a step ------------------------------------------------------------------------------------------
function timeBars(grid) {
  if (!RUNS.some((run) => run.phases)) return;
  const body = card(grid, "Where a step's time goes", "seconds a step, mean over the run");
  const height = 34 * RUNS.length + 30, width = 400, left = RUNS.length > 1 ? 92 : 4;
  const longest = Math.max(...RUNS.map((run) => run.phases ? run.phases.total : 0));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "time of a step" });
  RUNS.forEach((run, row) => {
    if (!run.phases) return;
    if (RUNS.length > 1) picture.append(svg("text", { x: left - 6, y: row * 34 + 20, "text-anchor": "end" }, run.short));
    let x = left;
    Object.entries(PHASES).concat([["other", "other"]]).forEach(([key, label], i) => {
      const seconds = key === "other" ? run.phases.other : run.phases[key];
      if (!seconds) return;
      const wide = seconds / longest * (width - left - 4);
      const box = svg("rect", { x, y: row * 34 + 4, width: Math.max(wide - 1, 0.5), height: 24, rx: 3, fill: PHASE_COLOURS[i] || "#868e96" });
      box.addEventListener("mousemove", (event) => showTip(event, [run.short, `${label}: ${number(seconds)} s`, `${(100 * seconds / run.phases.total).toFixed(1)} %`]));
      box.addEventListener("mouseleave", hideTip);
      picture.append(box);
      x += wide;
    });
  });
  for (const x of ticks(0, longest, 4)) picture.append(svg("text", { x: left + x / longest * (width - left - 4), y: height - 6, "text-anchor": x ? "middle" : "start" }, number(x) + " s"));
  body.append(picture, html("div", { class: "key" }, ...Object.values(PHASES).concat(["other"]).map((label, i) =>
    html("span", {}, html("i", { class: "box", style: `background:${PHASE_COLOURS[i] || "#868e96"}` }), label))));
}

// ---- the page ------------------------------------------------------------------------------------------------
function table(head, rows, warn) {
  return html("div", { class: "scroll" }, html("table", {},
    html("thead", {}, html("tr", {}, ...head.map((cell) => html("th", {}, cell)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map((cell, i) => html("td", warn && warn(row, i) ? { class: "warn" } : {}, number(cell))))))));
}
const legend = document.getElementById("legend");
RUNS.forEach((run, index) => {
  const chip = html("button", { class: "chip", type: "button", title: "show or hide", onclick: () => {
    if (state.hidden.has(index)) state.hidden.delete(index); else state.hidden.add(index);
    chip.classList.toggle("off", state.hidden.has(index));
    redraws.forEach((draw) => draw());
  } }, html("span", { class: "dot", style: `background:${COLOURS[index % COLOURS.length]}` }), run.label);
  legend.append(chip);
});

const summary = section("Summary");
RUNS.forEach((run, index) => {
  const body = card(summary, run.label);
  body.append(html("div", { class: "big" }, run.headline.value, " ", html("small", {}, run.headline.label)));
  const facts = html("dl", { class: "facts" });
  run.facts.forEach(([label, value]) => facts.append(html("dt", {}, label), html("dd", {}, String(value))));
  body.append(facts);
  body.parentNode.style.borderTop = `3px solid ${COLOURS[index % COLOURS.length]}`;
});

const train = section("Training");
chart(train, "Top-1, %", [{ name: "test:acc1", label: "test" }, { name: "train:acc1", label: "train", dash: "5 4" }, { name: "ema_test:acc1", label: "test, averaged weights", dash: "1 4" }]);
chart(train, "Loss", [{ name: "test:loss", label: "test" }, { name: "train:loss", label: "train", dash: "5 4" }, { name: "ema_test:loss", label: "test, averaged weights", dash: "1 4" }]);
chart(train, "Loss of each step", ["loss"]);
chart(train, "Top-1 of each step, %", ["acc1"]);
chart(train, "Learning rate", ["lr"], { exact: true, zero: true });
chart(train, "Gradient norm", ["grad_norm"]);

const speed = section("Speed and cost");
chart(speed, "Images a second", [{ name: "images_per_s", label: "in all" }, { name: "compute_images_per_s", label: "without the wait for data", dash: "5 4" }], { zero: true });
timeBars(speed);
chart(speed, "Wait for data, seconds a step", ["data_wait_s"], { zero: true });
chart(speed, "Model FLOP utilisation", ["mfu"], { zero: true });
chart(speed, "TFLOP/s a device", ["tflops_per_device"], { zero: true });
chart(speed, "Peak memory, GiB", [{ name: "memory/peak_bytes", label: "peak", scale: 1 / 2 ** 30 }, { name: "memory/reserved_bytes", label: "reserved", dash: "5 4", scale: 1 / 2 ** 30 }, { name: "memory/planned_bytes", label: "planned", dash: "1 4", scale: 1 / 2 ** 30 }], { zero: true, exact: true });

if (RUNS.some((run) => run.health.length)) {
  const health = section("Spikes", "Measured on one batch now and then; hover for figures.");
  healthMaps(health);
  chart(health, "Firing rate of the whole network", ["spikes/firing_rate"], { exact: true, zero: true });
  chart(health, "Dead channels, mean over the layers", ["spikes/dead_share"], { exact: true, zero: true });
  chart(health, "Energy an image, mJ", [{ name: "energy/snn_mj_per_image", label: "this network" }, { name: "energy/ann_mj_per_image", label: "the same ANN", dash: "5 4" }],
    { exact: true, zero: true, text: "45 nm: 0.9 pJ an addition, 4.6 pJ a multiply-accumulate (Horowitz 2014)" });
  chart(health, "Synaptic operations an image", ["energy/synops_per_image"], { exact: true, zero: true });
}

const happened = RUNS.flatMap((run) => run.events.map((event) => [...(RUNS.length > 1 ? [run.short] : []), ...event]));
if (happened.length) {
  const box = card(section("What happened"), "Starts, alerts, notices");
  box.parentNode.style.gridColumn = "1 / -1";
  box.append(table([...(RUNS.length > 1 ? ["run"] : []), "when", "step", "what", ""], happened, (row) => row[row.length - 2] === "alert"));
}
const settings = card(section("Settings"), RUNS.length > 1 ? "Where the runs differ" : "All settings");
settings.parentNode.style.gridColumn = "1 / -1";
const head = ["setting", ...RUNS.map((run) => run.short)];
if (RUNS.length > 1) {
  settings.append(DATA.differences.length ? table(head, DATA.differences.map(([name, values]) => [name, ...values])) : html("p", {}, "nowhere"));
  settings.append(html("details", {}, html("summary", {}, "all settings"), table(head, DATA.settings.map(([name, values]) => [name, ...values]))));
} else {
  settings.append(html("details", {}, html("summary", {}, `${DATA.settings.length} settings`), table(head, DATA.settings.map(([name, values]) => [name, ...values]))));
}

document.getElementById("axis").addEventListener("change", (event) => { state.axis = event.target.value; redraws.forEach((draw) => draw()); });
document.getElementById("smooth").addEventListener("input", (event) => { state.smooth = Number(event.target.value); redraws.forEach((draw) => draw()); });
const root = document.documentElement;
root.dataset.theme = new URLSearchParams(location.search).get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });
document.body.dataset.ready = "yes";
