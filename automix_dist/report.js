"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const COLORS = 5, DASHES = ["", "6 3", "2 3", "8 3 2 3"], MARGIN = {top: 8, right: 8, bottom: 22};

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function svg(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// Numbers
function format(value, unit) {
  if (value === null) return "not finite";
  if (unit === "percent") return (100 * value).toFixed(2) + " %";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
}
function place(step) {
  const epoch = data.stepsPerEpoch ? ", epoch " + Math.max(Math.ceil(step / data.stepsPerEpoch), 1) : "";
  return "step " + step.toLocaleString("en") + epoch;
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).reduce((a, b) => b / rough < rough / a ? b : a);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return {found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9))};
}
function tickText(value, digits, unit) {
  if (unit === "percent") return (100 * value).toFixed(Math.max(0, digits - 2)) + " %";
  if (value && Math.abs(value) < 1e-3) return value.toExponential(1).replace(".0e", "e");
  if (Math.abs(value) >= 1e4) return value.toLocaleString("en", {notation: "compact"});
  return value.toFixed(Math.min(digits, 8));
}

// A running mean that forgets: weight `amount` stays from point to point; gaps in the curve do not count.
function smooth(values, amount) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = amount * sum + (1 - amount) * value;
    weight = amount * weight + (1 - amount);
    return sum / weight;
  });
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.log = false;
    spec.series.forEach((series, i) => {
      series.color = `var(--c${i % COLORS})`;
      series.dash = DASHES[Math.floor(i / COLORS) % DASHES.length];
      series.shown = true;
    });
    const values = spec.series.flatMap((series) => series.y).filter((v) => v !== null);
    this.plot = element("div", {class: "plot"});
    this.tip = element("div", {class: "tip"});
    this.tip.hidden = true;
    const title = element("h3", {}, spec.title);
    if (spec.unit && spec.unit !== "percent") title.append(element("span", {}, spec.unit));
    const head = element("header", {}, title);
    // A log scale is of use only where values of unlike size share a chart.
    const [least, most] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (least > 0 && most > 20 * least && spec.unit !== "percent") head.append(this.logButton());
    this.card = element("article", {class: "card chart"}, head, this.plot, this.names());
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
  }
  logButton() {
    const button = element("button", {type: "button", "aria-pressed": "false"}, "Log scale");
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", this.log);
      button.textContent = this.log ? "Linear scale" : "Log scale";
      this.draw();
    });
    return button;
  }
  names() {
    const names = element("div", {class: "names"});
    for (const series of this.spec.series) {
      const swatch = svg("svg", {viewBox: "0 0 18 8", "aria-hidden": "true"});
      const style = `stroke:${series.color}`;
      swatch.append(svg("line", {x1: 0, x2: 18, y1: 4, y2: 4, style, "stroke-dasharray": series.dash}));
      const button = element("button", {type: "button", "aria-pressed": "true"}, swatch, series.name);
      button.addEventListener("click", () => {
        series.shown = !series.shown;
        button.setAttribute("aria-pressed", series.shown);
        this.draw();
      });
      names.append(button);
    }
    return names;
  }
  draw() {
    const amount = Number(find("smoothing").value);
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    const shown = this.spec.series.filter((series) => series.shown);
    for (const series of shown) {
      series.raw = this.spec.smooth && series.kind === "train" && amount > 0 && series.y.length > 2;
      series.line = series.raw ? smooth(series.y, amount) : series.y;
    }
    this.canvas = svg("svg", {role: "img", "aria-label": this.describe(shown)});
    this.plot.replaceChildren(this.canvas, this.tip);
    const xs = shown.flatMap((series) => series.x);
    const ys = shown.flatMap((series) => series.y).filter((v) => v !== null).map((v) => this.log ? Math.log10(v) : v);
    if (!xs.length) return;
    let [left, right] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
    let [low, high] = ys.length ? [ys.reduce((a, b) => Math.min(a, b)), ys.reduce((a, b) => Math.max(a, b))] : [0, 1];
    if (left === right) { left -= 1; right += 1; }
    const spare = (high - low || Math.abs(high) || 1) * 0.06;
    const floor = !this.log && low >= 0 ? 0 : -Infinity;
    const ceiling = this.spec.unit === "percent" && high <= 1 ? 1 : Infinity;
    low = Math.max(low - spare, floor); high = Math.min(high + spare, ceiling);
    if (low === high) low -= spare;
    const rows = ticks(low, high, 5), texts = rows.found.map((v) =>
      this.log ? format(Number((10 ** v).toPrecision(2)), this.spec.unit) : tickText(v, rows.digits, this.spec.unit));
    const start = Math.max(...texts.map((text) => text.length), 2) * 6.4 + 8;
    this.x = (v) => start + (v - left) / (right - left) * (width - start - MARGIN.right);
    const tall = height - MARGIN.top - MARGIN.bottom;
    this.y = (v) => MARGIN.top + (high - (this.log ? Math.log10(v) : v)) / (high - low) * tall;
    rows.found.forEach((v, i) => {
      const y = this.y(this.log ? 10 ** v : v);
      this.canvas.append(svg("line", {class: "grid", x1: start, x2: width - MARGIN.right, y1: y, y2: y}),
        svg("text", {x: start - 8, y: y + 4, "text-anchor": "end"}, texts[i]));
    });
    const columns = ticks(Math.max(left, 0), right, Math.max(2, Math.floor(width / 80)));
    columns.found.filter(Number.isInteger).forEach((v) => this.canvas.append(svg("text", {x: this.x(v), y: height - 4,
      "text-anchor": this.x(v) > width - 24 ? "end" : "middle"}, tickText(v, 0, ""))));
    for (const series of shown) this.drawSeries(series, height);
  }
  drawSeries(series, height) {
    const style = `stroke:${series.color}`, bottom = height - MARGIN.bottom - 2;
    if (series.raw) this.canvas.append(svg("path", {class: "raw", style, d: this.path(series.x, series.y)}));
    this.canvas.append(svg("path", {style, d: this.path(series.x, series.line), "stroke-dasharray": series.dash}));
    series.x.forEach((x, i) => {
      if (series.y[i] === null)
        this.canvas.append(svg("text", {class: "bad", x: this.x(x), y: bottom, "text-anchor": "middle"}, "\u00d7"));
      else if (series.x.length <= 40 && !series.raw) this.canvas.append(this.dot(series, i, 2.5));
    });
  }
  dot(series, i, r) {
    return svg("circle", {cx: this.x(series.x[i]), cy: this.y(series.line[i]), r, style: `fill:${series.color}`});
  }
  path(xs, ys) {
    let pen = "M", path = "";
    xs.forEach((x, i) => {
      if (ys[i] === null) { pen = "M"; return; }
      path += pen + this.x(x).toFixed(1) + " " + this.y(ys[i]).toFixed(1);
      pen = "L";
    });
    return path;
  }
  describe(shown) {
    const text = (value) => format(value, this.spec.unit);
    const ends = shown.map((series) => `${series.name} from ${text(series.y[0])} to ${text(series.y.at(-1))}`);
    return `${this.spec.title}: ${ends.join("; ")}`;
  }
  point(event) {
    const shown = this.spec.series.filter((series) => series.shown);
    if (!shown.length || !this.x) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    const nearest = (series) => series.x.reduce((best, x, i) =>
      Math.abs(this.x(x) - at) < Math.abs(this.x(series.x[best]) - at) ? i : best, 0);
    const hits = shown.map((series) => ({series, i: nearest(series)}));
    const steps = hits.map(({series, i}) => series.x[i]);
    const step = steps.reduce((a, b) => Math.abs(this.x(b) - at) < Math.abs(this.x(a) - at) ? b : a);
    this.leave();
    const mark = svg("g", {class: "mark"});
    mark.append(svg("line", {class: "cursor", x1: this.x(step), x2: this.x(step), y1: MARGIN.top,
      y2: this.plot.clientHeight - MARGIN.bottom}));
    this.tip.replaceChildren(element("b", {}, place(step)));
    for (const {series, i} of hits) {
      if (series.line[i] !== null) mark.append(this.dot(series, i, 3.5));
      const name = series.x[i] === step ? series.name : `${series.name}, step ${series.x[i].toLocaleString("en")}`;
      this.tip.append(element("div", {}, element("span", {}, name), format(series.y[i], this.spec.unit)));
    }
    this.canvas.append(mark);
    this.tip.hidden = false;
    const x = this.x(step), width = this.plot.clientWidth, own = this.tip.offsetWidth;
    const beside = x < width / 2 ? x + 12 : x - own - 12;
    this.tip.style.left = Math.max(0, Math.min(width - own, beside)) + "px";
  }
  leave() {
    this.tip.hidden = true;
    this.canvas?.querySelector(".mark")?.remove();
  }
}

function showCharts() {
  const charts = data.charts.map((spec) => new Chart(spec));
  find("charts").replaceChildren(...charts.map((chart) => chart.card));
  if (!charts.length) find("charts").replaceWith(element("p", {class: "empty"}, "There are no values to draw yet."));
  const draw = () => charts.forEach((chart) => chart.draw());
  find("smoothing").addEventListener("input", (event) => {
    event.target.nextElementSibling.value = Number(event.target.value).toFixed(2);
    draw();
  });
  let width = 0;
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) { width = document.body.clientWidth; draw(); }
  }).observe(document.body);
}

function showGallery() {
  const gallery = data.gallery;
  if (!gallery) {
    find("gallery").append(element("p", {class: "empty"}, "There are no pictures yet."));
    return;
  }
  const slider = find("frame"), last = gallery.frames.length - 1;
  find("gallery").classList.toggle("small", gallery.small);
  find("legend").hidden = false;
  find("frames").hidden = false;
  slider.max = last;
  slider.value = last;
  slider.hidden = find("play").hidden = last === 0;
  const show = () => {
    const frame = gallery.frames[slider.value];
    slider.nextElementSibling.value = place(frame.step);
    for (const image of document.querySelectorAll("#gallery img")) {
      const {group, index, kind} = image.dataset, mix = frame[group][index];
      (group === "pairs" ? image.closest(".pair") : image.parentElement).hidden = !mix;
      if (!mix) continue;
      image.src = gallery.pictures[mix[kind]];
      image.nextElementSibling.replaceChildren(caption(kind, mix));
    }
  };
  slider.addEventListener("input", () => { stop(); show(); });
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; find("play").textContent = "Play"; };
  find("play").addEventListener("click", () => {
    if (timer) { stop(); return; }
    find("play").textContent = "Stop";
    if (Number(slider.value) === last) slider.value = 0;
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === last) stop();
    }, 450);
  });
  show();
}
function caption(kind, mix) {
  if (kind === "image") return mix.label;
  if (kind === "partner") return mix.partnerLabel;
  if (kind === "mixed") return "λ " + (mix.lam === null ? "\u2013" : mix.lam.toFixed(2));
  return "image " + Math.round(100 * (1 - mix.area)) + " %";
}

function switchTheme() {
  const order = ["auto", "light", "dark"], root = document.documentElement;
  let theme = "auto";
  try { theme = localStorage.getItem("automix-theme") || "auto"; } catch { /* storage is forbidden: no matter */ }
  const apply = () => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    find("theme").lastChild.textContent = theme;
  };
  find("theme").addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    try { localStorage.setItem("automix-theme", theme); } catch { /* as above */ }
    apply();
  });
  apply();
}
switchTheme();
showCharts();
showGallery();
