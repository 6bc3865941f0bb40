/* The optimizer lab's page: builds the controls, draws the paths as SVG, says the results.
 * The numbers are lab.js's. Nothing moves by itself. */
(function () {
  "use strict";

  var LAB = WeighingLab, SVG = "http://www.w3.org/2000/svg";
  var root = document.getElementById("lab");
  if (!root) return;

  var TITLES = {
    valley: "A valley",
    line: "Reddi's line",
    scales: "Two scales of gradients"
  };

  var SLIDERS = [
    ["lr", "learning rate"], ["lrSgd", "learning rate of SGD"],
    ["l2", "l2, into the gradient"], ["wd", "weight decay, from the weight"],
    ["beta1", "beta1, and SGD's momentum"], ["beta2", "beta2"], ["second", "second beta2"],
    ["eps", "eps"], ["tilt", "tilt of the valley, degrees"], ["steps", "steps"]
  ];

  var settings = LAB.fromHash(location.hash) || preset(LAB.PRESETS[2]);
  var parts = {}, runs = [], waiting = false, saying = 0;

  function preset(entry) {
    return LAB.defaults(entry[1], entry[2]);
  }

  // ------------------------------------------------------------------ small helpers

  function make(name, attributes, children) {
    var node = document.createElement(name);
    Object.keys(attributes || {}).forEach(function (key) {
      node.setAttribute(key, attributes[key]);
    });
    [].concat(children || []).forEach(function (child) { node.append(child); });
    return node;
  }

  function draw(parent, name, attributes, text) {
    var node = document.createElementNS(SVG, name);
    Object.keys(attributes).forEach(function (key) { node.setAttribute(key, attributes[key]); });
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function number(value) {
    if (!isFinite(value)) return String(value);
    var size = Math.abs(value);
    var text = value === 0 || (size >= 5e-4 && size < 1e6) ? String(Number(value.toPrecision(6)))
      : value.toExponential().replace("e", "·10^");
    return text.replace("-", "−").replace("^-", "^−");
  }

  function superscript(text) {                        // 2·10^−5 as nodes
    var at = text.indexOf("^");
    return at < 0 ? [text] : [text.slice(0, at), make("sup", {}, text.slice(at + 1))];
  }

  function fixed(value) {
    return (value < -5e-4 ? "−" : "") + Math.abs(value).toFixed(3);
  }

  function far(value) {                               // a distance; 3·10^−7 where three decimals show nothing
    return value !== 0 && value < 1e-3 ? number(Number(value.toPrecision(2))) : fixed(value);
  }

  function point(values) {
    return values.length === 1 ? fixed(values[0]) : "(" + values.map(fixed).join(", ") + ")";
  }

  // ------------------------------------------------------------------ the controls

  function choice(group, value, label, onchange) {
    var input = make("input", { type: "radio", name: "lab-" + group, value: value });
    input.addEventListener("change", function () { onchange(value); });
    parts[group + "-" + value] = input;
    return make("label", { "class": "lab-choice" }, [input, " " + label]);
  }

  function slider(key, label) {
    var id = "lab-" + key, input = make("input", { type: "range", id: id, min: "0", step: "1" });
    var output = make("output", { "for": id }), row = make("div", { "class": "lab-slider" },
      [make("label", { "for": id }, label), output, input]);
    input.addEventListener("input", function () {
      settings[key] = valuesOf(key)[Number(input.value)];
      changed();
    });
    parts[key] = { input: input, output: output, row: row };
    return row;
  }

  function valuesOf(key) {
    return key === "steps" ? LAB.STEPS[settings.on] : LAB.VALUES[key];
  }

  function nearest(values, value) {
    var best = 0;
    values.forEach(function (v, i) { if (Math.abs(v - value) < Math.abs(values[best] - value)) best = i; });
    return best;
  }

  function swatch(line) {
    var box = make("span", { "class": "lab-swatch", "aria-hidden": "true" });
    var svg = draw(box, "svg", { width: 28, height: 10, focusable: "false" });
    draw(svg, "line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke: LAB.LINES[line].color, "stroke-width": 3,
      "stroke-dasharray": LAB.LINES[line].dash || "none" });
    return box;
  }

  function legendRow(line) {
    var input = make("input", { type: "checkbox", id: "lab-line-" + line });
    input.addEventListener("change", function () {
      settings.lines = Object.keys(LAB.LINES).filter(function (name) { return parts.legend[name].input.checked; });
      changed();
    });
    var label = make("span"), ends = make("td"), distance = make("td");
    parts.legend[line] = { input: input, label: label, end: ends, far: distance };
    return make("tr", {}, [
      make("th", { scope: "row" }, make("label", { "for": "lab-line-" + line }, [input, swatch(line), label])), ends, distance]);
  }

  function build() {
    root.textContent = "";
    parts.legend = {};
    parts.said = make("p", { "class": "lab-lesson" });
    parts.presets = LAB.PRESETS.map(function (entry) {
      var button = make("button", { type: "button", "class": "lab-button" }, entry[0]);
      button.addEventListener("click", function () { settings = preset(entry); changed(); });
      return button;
    });
    parts.figure = make("div", { "class": "lab-figure" });
    parts.live = make("p", { "class": "lab-live visually-hidden", "aria-live": "polite", id: "lab-live" });
    parts.reset = make("button", { type: "button", "class": "lab-button" }, "Reset this surface");
    parts.reset.addEventListener("click", function () { settings = LAB.defaults(settings.on); changed(); });
    parts.caption = make("caption");
    parts.strip = make("div", { "class": "lab-strip", "aria-hidden": "true" });

    var presets = make("fieldset", { "class": "lab-presets" }, [make("legend", {}, "Lessons"), make("div", {}, parts.presets)]);
    var surfaces = make("fieldset", { "class": "lab-surfaces" }, [make("legend", {}, "Surface")].concat(
      Object.keys(TITLES).map(function (on) {
        return choice("on", on, TITLES[on], function () { settings = LAB.defaults(on); changed(); });
      })));
    var schedules = make("fieldset", { "class": "lab-schedules" }, [make("legend", {}, "Schedule")].concat(
      Object.keys(LAB.SCHEDULES).map(function (kind) {
        return choice("schedule", kind, LAB.SCHEDULES[kind], function () { settings.schedule = kind; changed(); });
      }), [parts.strip]));
    var table = make("table", { "class": "lab-legend" }, [
      parts.caption,
      make("thead", {}, make("tr", {}, [make("th", { scope: "col" }, "optimizer"),
        make("th", { scope: "col" }, "ends at"), make("th", { scope: "col" }, "distance")])),
      make("tbody", {}, Object.keys(LAB.LINES).map(legendRow))]);
    var sliders = make("fieldset", { "class": "lab-sliders" }, [make("legend", {}, "Settings")].concat(
      SLIDERS.map(function (entry) { return slider(entry[0], entry[1]); })));
    root.append(presets, parts.said, surfaces, parts.figure, parts.live, make("div", { "class": "lab-columns" }, [
      make("div", {}, [table, schedules, parts.reset]), sliders]));
  }

  // ------------------------------------------------------------------ drawing

  /* A box in the figure with its scales: {svg, x(value), y(value), left, right, top, bottom}. */
  function axes(width, height, xs, ys, options) {
    var box = { left: 46, right: width - 10, top: 10, bottom: height - 40 };
    var logX = options.logX, low = logX ? Math.log10(xs[0]) : xs[0], high = logX ? Math.log10(xs[1]) : xs[1];
    box.x = function (v) { return box.left + ((logX ? Math.log10(v) : v) - low) / (high - low) * (box.right - box.left); };
    box.y = function (v) { return box.bottom - (v - ys[0]) / (ys[1] - ys[0]) * (box.bottom - box.top); };
    box.svg = draw(parts.figure, "svg", { width: width, height: height, viewBox: "0 0 " + width + " " + height,
      role: "img", "aria-labelledby": "lab-title lab-desc" });
    draw(box.svg, "title", { id: "lab-title" }, options.title);
    draw(box.svg, "desc", { id: "lab-desc" }, options.describe);
    draw(draw(box.svg, "clipPath", { id: "lab-clip" }), "rect", { x: box.left, y: box.top,
      width: box.right - box.left, height: box.bottom - box.top });
    options.xTicks.forEach(function (v) {
      draw(box.svg, "line", { "class": "lab-grid", x1: box.x(v), x2: box.x(v), y1: box.top, y2: box.bottom });
      draw(box.svg, "text", { x: box.x(v), y: box.bottom + 16, "text-anchor": box.x(v) > box.right - 12 ? "end" : "middle" },
        v >= 1000 ? v / 1000 + "k" : number(v));
    });
    options.yTicks.forEach(function (v) {
      draw(box.svg, "line", { "class": "lab-grid", x1: box.left, x2: box.right, y1: box.y(v), y2: box.y(v) });
      draw(box.svg, "text", { x: box.left - 6, y: box.y(v) + 4, "text-anchor": "end" }, number(v));
    });
    draw(box.svg, "text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, options.xLabel);
    draw(box.svg, "text", { transform: "translate(12 " + (box.top + box.bottom) / 2 + ") rotate(-90)", "text-anchor": "middle" }, options.yLabel);
    box.inner = draw(box.svg, "g", { "clip-path": "url(#lab-clip)" });
    return box;
  }

  /* Points as an SVG path; what is nearer than half a pixel to the last is left out. */
  function pathOf(points) {
    var text = "", lastX = NaN, lastY = NaN, pen = "M";
    for (var i = 0; i < points.length; i += 2) {
      var x = points[i], y = points[i + 1];
      if (!isFinite(x) || !isFinite(y) || Math.abs(x) > 1e5 || Math.abs(y) > 1e5) break;
      if (i < points.length - 2 && Math.abs(x - lastX) < 0.5 && Math.abs(y - lastY) < 0.5) continue;
      text += pen + x.toFixed(1) + " " + y.toFixed(1);
      lastX = x; lastY = y; pen = "L";
    }
    return text;
  }

  function stroke(box, points, line) {
    return draw(box.inner, "path", { d: pathOf(points), fill: "none", stroke: LAB.LINES[line].color, "stroke-width": 2,
      "stroke-linejoin": "round", "stroke-dasharray": LAB.LINES[line].dash || "none", "data-line": line });
  }

  function mark(box, values, label, kind, below) {
    var x = box.x(values[0]), y = box.y(values[1]), r = 5;
    if (kind === "cross") {
      draw(box.inner, "path", { "class": "lab-mark", d: "M" + (x - r) + " " + (y - r) + "l10 10m-10 0l10 -10" });
    } else {
      draw(box.inner, "circle", { "class": "lab-mark", cx: x, cy: y, r: r - 1 });
    }
    var atEdge = x > box.right - 40;
    draw(box.inner, "text", { "class": "lab-note", x: x + (atEdge ? -9 : below ? 4 : 9), y: y + (below ? 19 : -7),
      "text-anchor": atEdge ? "end" : "start" }, label);
  }

  function paths(box, dots) {
    runs.forEach(function (found) {
      var points = new Float64Array(found.path.length);
      for (var i = 0; i < points.length; i += 2) {
        points[i] = box.x(found.path[i]);
        points[i + 1] = box.y(found.path[i + 1]);
      }
      stroke(box, points, found.line);
    });
    if (dots) runs.forEach(function (found) {
      var end = LAB.end(found);
      if (end.every(isFinite)) {
        draw(box.inner, "circle", { cx: box.x(end[0]), cy: box.y(end[1]), r: 4, fill: LAB.LINES[found.line].color });
      }
    });
  }

  function drawValley(width, describe) {
    var height = Math.round((width - 56) * 0.68) + 50;
    var box = axes(width, height, [-2.7, 2.7], [-1.5, 2.172], { title: "Paths in the valley", describe: describe,
      xTicks: [-2, -1, 0, 1, 2], yTicks: [-1, 0, 1, 2], xLabel: "first weight", yLabel: "second weight" });
    var best = LAB.VALLEY.best, tilt = settings.tilt * Math.PI / 180, c = Math.cos(tilt), s = Math.sin(tilt);
    [0.002, 0.01, 0.03, 0.08, 0.2, 0.5, 1.2, 2.5, 5].forEach(function (level) {
      var along = Math.sqrt(2 * level / LAB.VALLEY.flat), across = Math.sqrt(2 * level / LAB.VALLEY.steep), points = [];
      for (var k = 0; k <= 180; k++) {
        var u = along * Math.cos(k * Math.PI / 90), w = across * Math.sin(k * Math.PI / 90);
        points.push(box.x(best[0] + c * u - s * w), box.y(best[1] + s * u + c * w));
      }
      draw(box.inner, "path", { "class": "lab-contour", d: pathOf(points) });
    });
    mark(box, LAB.VALLEY.start, "start", "circle");
    if (settings.l2 > 0 || settings.wd > 0) mark(box, [0, 0], "where L2 and decay pull", "circle", true);
    paths(box, true);
    mark(box, best, "best", "cross");
  }

  function drawScales(width, describe) {
    var side = Math.min(width, 520);
    var box = axes(side, Math.round(side * 0.86), [-0.12, 1.12], [-0.12, 1.12], {
      title: "Mean weights with large and with small gradients", describe: describe,
      xTicks: [0, 0.5, 1], yTicks: [0, 0.5, 1], xLabel: "weights with gradients of scale 1",
      yLabel: "weights with gradients of scale 0.01" });
    paths(box, true);
    [["l2", /^(adam|adam2|amsgrad)$/], ["wd", /^(adamw|amsgradw)$/]].forEach(function (entry) {
      if (!runs.some(function (found) { return entry[1].test(found.line); })) return;
      var line = LAB.forecast(entry[0], settings).path, points = [];
      for (var i = 0; i < line.length; i += 2) points.push(box.x(line[i]), box.y(line[i + 1]));
      draw(box.inner, "path", { "class": "lab-forecast", d: pathOf(points) });
    });
    draw(box.svg, "text", { "class": "lab-note", x: box.left + 6, y: box.top + 14 }, "dotted: chapter 3's forecast");
    mark(box, [1, 1], "start", "circle");
    mark(box, [0, 0], "where L2 and decay pull", "cross", true);
  }

  function drawLine(width, describe) {
    var steps = settings.steps, ticks = [];
    for (var t = 1; t <= steps; t *= width < 500 ? 100 : 10) ticks.push(t);
    var box = axes(width, Math.max(250, Math.min(380, Math.round(width * 0.56))), [1, steps], [-1.12, 1.12], {
      title: "The weight x over the steps, on a logarithmic axis", describe: describe, logX: true,
      xTicks: ticks, yTicks: [-1, 0, 1], xLabel: "step", yLabel: "weight x" });
    draw(box.svg, "text", { "class": "lab-note", x: box.left + 6, y: box.y(-1) - 5 }, "best");
    draw(box.svg, "text", { "class": "lab-note", x: box.left + 6, y: box.y(1) + 14 }, "worst");
    runs.forEach(function (found) {                    // per column of pixels: first, lowest, highest, last
      var points = [], column = -1, low, high, at, x;
      for (var t = 1; t <= steps; t++) {
        x = found.path[t];
        var here = Math.floor(box.x(t));
        if (here !== column) {
          if (column >= 0) points.push(at, box.y(low), at, box.y(high), at, box.y(found.path[t - 1]));
          column = here; at = box.x(t); low = high = x;
          points.push(at, box.y(x));
        }
        if (x < low) low = x;
        if (x > high) high = x;
      }
      points.push(at, box.y(low), at, box.y(high), box.x(steps), box.y(found.path[steps]));
      stroke(box, points, found.line).setAttribute("stroke-width", 1.5);
    });
  }

  function drawStrip() {
    parts.strip.textContent = "";
    var plan = LAB.schedule(settings.schedule, settings.lr, settings.beta1, Math.min(settings.steps, 240));
    [["learning rate", plan.lr, LAB.LINES.adamw.color], ["beta1", plan.beta1, LAB.LINES.adam.color]].forEach(function (entry) {
      var values = entry[1], high = entry[0] === "beta1" ? 1 : settings.lr, low = entry[0] === "beta1" ? Math.min(0.8, settings.beta1) : 0;
      var points = [];
      for (var k = 0; k < values.length; k++) {
        points.push(2 + k / (values.length - 1) * 76, 26 - (values[k] - low) / (high - low) * 22);
      }
      var svg = draw(parts.strip, "svg", { width: 80, height: 44 });
      draw(svg, "path", { d: pathOf(points), fill: "none", stroke: entry[2], "stroke-width": 1.5 });
      draw(svg, "text", { x: 40, y: 40, "text-anchor": "middle" }, entry[0]);
    });
  }

  // ------------------------------------------------------------------ the whole page

  function labelOf(line) {
    var text = LAB.LINES[line].label;
    return line === "adam2" ? "Adam, beta2 " + number(settings.second) : text;
  }

  function describe() {
    var goal = settings.on === "line" ? "the best x, −1" : settings.on === "valley" ? "the best point, (1.500, 0.500)" : "the origin";
    var ends = runs.map(function (found) {
      var end = LAB.end(found);
      if (!end.every(function (x) { return Math.abs(x) < 1e6; })) return labelOf(found.line) + " has diverged";
      return labelOf(found.line) + " ends at " + point(end) + ", distance " + far(LAB.distance(settings.on, end));
    });
    return TITLES[settings.on] + ", " + settings.steps.toLocaleString("en") + " steps, schedule " + LAB.SCHEDULES[settings.schedule] +
      "; distances are from " + goal + ". " + (ends.length ? ends.join("; ") + "." : "No line is chosen.");
  }

  function showControls() {
    parts["on-" + settings.on].checked = true;
    parts["schedule-" + settings.schedule].checked = true;
    var cycled = settings.schedule === "1cycle";
    var sgd = settings.lines.some(function (line) { return line.indexOf("sgd") === 0; });
    var adam = settings.lines.some(function (line) { return line.indexOf("sgd") !== 0; });
    SLIDERS.forEach(function (entry) {
      var key = entry[0], part = parts[key], values = valuesOf(key), value = settings[key];
      part.input.max = String(values.length - 1);
      part.input.value = String(nearest(values, value));
      var text = key === "steps" ? value.toLocaleString("en") : (key === "l2" || key === "wd") && value === 0 ? "0 (off)" : number(value);
      if (key === "beta1" && cycled) text = "0.95 to 0.85 and back";
      part.output.replaceChildren.apply(part.output, superscript(text));
      part.input.setAttribute("aria-valuetext", text.replace("·10^", " times ten to the "));
      part.input.disabled = key === "beta1" && cycled;
      var idle = key === "lrSgd" ? !sgd : key === "lr" || key === "eps" ? !adam
        : key === "second" ? settings.lines.indexOf("adam2") < 0 : key === "tilt" && settings.on !== "valley";
      part.row.hidden = key === "tilt" && settings.on !== "valley";
      part.row.classList.toggle("lab-idle", idle);
    });
    var chosen = LAB.PRESETS.findIndex(function (entry) { return LAB.toHash(preset(entry)) === LAB.toHash(settings); });
    parts.presets.forEach(function (button, i) { button.setAttribute("aria-pressed", String(i === chosen)); });
    if (chosen >= 0) parts.lesson = chosen;
    else if (parts.lesson !== undefined && LAB.PRESETS[parts.lesson][1] !== settings.on) parts.lesson = undefined;
    parts.said.textContent = parts.lesson === undefined ? "Choose a lesson, or set everything by hand." : LAB.PRESETS[parts.lesson][3];
    parts.caption.textContent = "Lines, and their distance in the end from " + (settings.on === "scales" ? "(0, 0)" : "the best");
    Object.keys(LAB.LINES).forEach(function (line) {
      var row = parts.legend[line], found = runs.filter(function (r) { return r.line === line; })[0];
      row.input.checked = !!found;
      row.label.textContent = labelOf(line);
      var end = found && LAB.end(found), near = end && end.every(function (x) { return Math.abs(x) < 1e6; });
      row.end.textContent = !found ? "" : near ? point(end) : "diverged";
      row.far.replaceChildren.apply(row.far, near ? superscript(far(LAB.distance(settings.on, end))) : []);
    });
  }

  function update() {
    waiting = false;
    runs = settings.lines.map(function (line) { return LAB.run(line, settings); });
    var text = describe();
    redraw();
    showControls();
    drawStrip();
    clearTimeout(saying);                              // say it once the reader rests
    saying = setTimeout(function () { parts.live.textContent = text; }, parts.live.textContent ? 500 : 0);
    root.setAttribute("data-ready", LAB.toHash(settings));
  }

  function redraw() {
    parts.width = Math.max(280, Math.min(760, Math.floor(parts.figure.clientWidth)));
    parts.figure.textContent = "";
    ({ valley: drawValley, line: drawLine, scales: drawScales })[settings.on](parts.width, describe());
  }

  function changed() {
    var hash = "#" + LAB.toHash(settings);
    try { history.replaceState(null, "", hash); } catch (refused) { location.hash = hash; }
    if (!waiting) { waiting = true; setTimeout(update, 0); }
  }

  window.addEventListener("hashchange", function () {
    var given = LAB.fromHash(location.hash);
    if (given && LAB.toHash(given) !== LAB.toHash(settings)) { settings = given; changed(); }
  });
  window.addEventListener("resize", function () {
    if (Math.floor(parts.figure.clientWidth) !== parts.width) redraw();
  });

  build();
  update();
})();
