/* The optimizer lab's numbers: optimizers, schedules and surfaces of nbutils, in float64.
 *
 * Nothing here draws or touches a page, so that tests/test_lab.py can run this file in a
 * bare JavaScript engine and hold every path against nbutils'. A classic script, not a
 * module: browsers refuse to load modules from file://.
 */
var WeighingLab = (function () {
  "use strict";

  // ------------------------------------------------------------------ optimizers

  /* One step of SGD (nbutils.SGD), in place. h: lr, l2, weightDecay, beta1 (the momentum). */
  function sgdStep(p, gradient, state, h) {
    for (var i = 0; i < p.length; i++) {
      var g = gradient[i];
      if (h.l2 !== 0) g += h.l2 * p[i];
      if (h.weightDecay !== 0) p[i] *= 1 - h.lr * h.weightDecay;
      if (h.beta1 !== 0) {
        state.m[i] = state.m[i] * h.beta1 + g;
        g = state.m[i];
      }
      p[i] -= h.lr * g;
    }
  }

  /* One step of Adam or AdamW (nbutils.Adam), in place.
   * h: lr, l2, weightDecay, beta1, beta2, eps, amsgrad. */
  function adamStep(p, gradient, state, h) {
    state.step += 1;
    var mCorrection = 1 - Math.pow(h.beta1, state.step);
    var vCorrection = 1 - Math.pow(h.beta2, state.step);
    for (var i = 0; i < p.length; i++) {
      var g = gradient[i];
      if (h.l2 !== 0) g += h.l2 * p[i];                             // into the gradient
      if (h.weightDecay !== 0) p[i] *= 1 - h.lr * h.weightDecay;    // from the weight
      state.m[i] += (1 - h.beta1) * (g - state.m[i]);
      state.v[i] = state.v[i] * h.beta2 + (1 - h.beta2) * g * g;
      var v = state.v[i];
      if (h.amsgrad) v = state.top[i] = Math.max(state.top[i], v);  // raw v, then corrected
      p[i] -= h.lr / mCorrection * state.m[i] / (Math.sqrt(v) / Math.sqrt(vCorrection) + h.eps);
    }
  }

  /* The lines that can be drawn. `decay` says where the coefficient goes. */
  var LINES = {
    sgd: { label: "SGD, L2", color: "#7f7f7f", step: sgdStep, decay: "l2" },
    sgdw: { label: "SGD, decay", color: "#7f7f7f", dash: "7 5", step: sgdStep, decay: "weightDecay" },
    adam: { label: "Adam, L2", color: "#0072b2", step: adamStep, decay: "l2" },
    adam2: { label: "Adam, second beta2", color: "#56b4e9", step: adamStep, decay: "l2" },
    adamw: { label: "AdamW", color: "#e69f00", step: adamStep, decay: "weightDecay" },
    amsgrad: { label: "amsgrad, L2", color: "#009e73", step: adamStep, decay: "l2" },
    amsgradw: { label: "amsgrad, decay", color: "#009e73", dash: "7 5", step: adamStep, decay: "weightDecay" }
  };

  /* A line's hyper-parameters, but for lr and beta1, which the schedule gives. */
  function hypers(line, settings) {
    var l2 = LINES[line].decay === "l2";
    return {
      l2: l2 ? settings.l2 : 0, weightDecay: l2 ? 0 : settings.wd, eps: settings.eps,
      beta2: line === "adam2" ? settings.second : settings.beta2,
      amsgrad: line === "amsgrad" || line === "amsgradw"
    };
  }

  // ------------------------------------------------------------------ schedules

  /* Phases laid end to end (nbutils.phases): [fraction, start, end, shape] each. */
  function phases(parts) {
    var starts = [], end = 0;
    parts.forEach(function (part) { starts.push(end); end += part[0]; });
    return function (progress) {
      var j = parts.length - 1;
      while (starts[j] > progress) j--;
      var done = Math.min((progress - starts[j]) / parts[j][0], 1);
      if (parts[j][3] === "cosine") done = (1 - Math.cos(Math.PI * done)) / 2;
      return parts[j][1] + done * (parts[j][2] - parts[j][1]);
    };
  }

  var TAIL = 0.075, WARM = (1 - TAIL) / 2, DOWN = 1 - WARM - TAIL, HIGH = 0.95, LOW = 0.85;

  /* The rate and beta1 of every step: {lr: Float64Array, beta1: Float64Array}. */
  function schedule(kind, lr, beta1, steps) {
    var rates = phases([[1, lr, lr]]), momenta = phases([[1, beta1, beta1]]);
    if (kind === "cosine") rates = phases([[1, lr, 0, "cosine"]]);
    if (kind === "1cycle") {                                       // nbutils.one_cycle(lr)
      rates = phases([[WARM, lr / 10, lr], [DOWN, lr, lr / 10], [TAIL, lr / 10, lr / 10 / 100]]);
      momenta = phases([[WARM, HIGH, LOW], [DOWN, LOW, HIGH], [TAIL, HIGH, HIGH]]);
    }
    var found = { lr: new Float64Array(steps), beta1: new Float64Array(steps) };
    for (var k = 0; k < steps; k++) {
      found.lr[k] = kind === "root" ? lr / Math.sqrt(k + 1) : rates(k / steps);
      found.beta1[k] = momenta(k / steps);
    }
    return found;
  }

  // ------------------------------------------------------------------ surfaces

  /* mulberry32: the same numbers in [0, 1) from the same seed, in any language. */
  function random(seed) {
    var a = seed | 0;
    return function () {
      a = (a + 0x6d2b79f5) | 0;
      var t = Math.imul(a ^ (a >>> 15), 1 | a);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  var VALLEY = { best: [1.5, 0.5], start: [-2, 1.5], steep: 1, flat: 0.02 };
  var WEIGHTS = 100, SCALES = [1, 0.01];

  /* Each surface: the weights at the start, `gradient(settings)` which makes a function of
   * p, step (from 1) and an array to fill, and `show`, which puts what is drawn into a path. */
  var SURFACES = {
    valley: {
      start: function () { return Float64Array.from(VALLEY.start); },
      best: VALLEY.best,
      gradient: function (settings) {
        var c = Math.cos(settings.tilt * Math.PI / 180), s = Math.sin(settings.tilt * Math.PI / 180);
        return function (p, step, g) {
          var x = p[0] - VALLEY.best[0], y = p[1] - VALLEY.best[1];
          var along = VALLEY.flat * (c * x + s * y), across = VALLEY.steep * (c * y - s * x);
          g[0] = c * along - s * across;
          g[1] = s * along + c * across;
        };
      },
      show: function (p, path, at) { path[at] = p[0]; path[at + 1] = p[1]; }
    },
    line: {
      start: function () { return new Float64Array(1); },
      best: [-1],
      gradient: function () {
        return function (p, step, g) { g[0] = step % 101 === 1 ? 1010 : -10; };
      },
      keep: function (p) { p[0] = Math.min(1, Math.max(-1, p[0])); },
      show: function (p, path, at) { path[at] = p[0]; }
    },
    scales: {
      start: function () { return new Float64Array(2 * WEIGHTS).fill(1); },
      best: [0, 0],
      gradient: function () {
        var draw = random(0);
        return function (p, step, g) {                       // uniform noise, root mean square 1
          for (var i = 0; i < WEIGHTS; i++) {
            var z = (2 * draw() - 1) * Math.sqrt(3);
            g[i] = SCALES[0] * z;
            g[WEIGHTS + i] = SCALES[1] * z;
          }
        };
      },
      show: function (p, path, at) {                         // the mean weight of either scale
        var first = 0, second = 0;
        for (var i = 0; i < WEIGHTS; i++) { first += p[i]; second += p[WEIGHTS + i]; }
        path[at] = first / WEIGHTS;
        path[at + 1] = second / WEIGHTS;
      }
    }
  };

  /* Run one line: the shown coordinates at the start and after each step, flat, and the weights. */
  function run(line, settings) {
    var surface = SURFACES[settings.on], h = hypers(line, settings), step = LINES[line].step;
    var top = step === sgdStep ? settings.lrSgd : settings.lr;
    var plan = schedule(settings.schedule, top, settings.beta1, settings.steps);
    var p = surface.start(), gradient = surface.gradient(settings), g = new Float64Array(p.length);
    var state = { step: 0, m: g.slice(), v: g.slice(), top: g.slice() };
    var dim = surface.best.length, path = new Float64Array((settings.steps + 1) * dim);
    surface.show(p, path, 0);
    for (var k = 0; k < settings.steps; k++) {
      gradient(p, k + 1, g);
      h.lr = plan.lr[k];
      h.beta1 = plan.beta1[k];
      step(p, g, state, h);
      if (surface.keep) surface.keep(p);
      surface.show(p, path, (k + 1) * dim);
    }
    return { line: line, dim: dim, steps: settings.steps, path: path, weights: p };
  }

  /* The last shown point of a run. */
  function end(found) {
    return Array.from(found.path.subarray(found.steps * found.dim));
  }

  /* How far a point is from the surface's best. */
  function distance(on, point) {
    return Math.sqrt(point.reduce(function (sum, x, i) {
      return sum + Math.pow(x - SURFACES[on].best[i], 2);
    }, 0));
  }

  /* The two scales without noise: chapter 3's boxed mean step, in the form of a run's path. */
  function forecast(kind, settings) {
    var plan = schedule(settings.schedule, settings.lr, settings.beta1, settings.steps);
    var theta = [1, 1], path = new Float64Array(2 * (settings.steps + 1)).fill(1);
    for (var k = 0; k < settings.steps; k++) {
      for (var i = 0; i < 2; i++) {
        var pull = (kind === "l2" ? settings.l2 : settings.wd) * theta[i];
        if (kind === "l2" && pull !== 0) pull /= Math.hypot(SCALES[i], pull);
        theta[i] -= plan.lr[k] * pull;
        path[2 * (k + 1) + i] = theta[i];
      }
    }
    return { line: kind, dim: 2, steps: settings.steps, path: path };
  }

  // ------------------------------------------------------------------ settings

  /* 1, 1.25, 1.5, 2 ... 8 times each power of ten from 10^low to 10^high. */
  function logList(low, high, zero) {
    var found = zero ? [0] : [];
    for (var k = low; k < high; k++) {
      [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8].forEach(function (m) { found.push(Number(m + "e" + k)); });
    }
    return found.concat([Number("1e" + high)]);
  }

  var MEMORIES = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99999];

  /* What each slider can be set to; a link may give any number between the first and the last. */
  var VALUES = {
    lr: logList(-4, 0), lrSgd: logList(-5, 0), l2: logList(-5, 1, true), wd: logList(-5, 1, true),
    beta1: [0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
    beta2: MEMORIES, second: MEMORIES, eps: logList(-10, 0),
    tilt: [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
  };
  var STEPS = {
    valley: [50, 100, 150, 200, 300, 400, 600, 800, 1000, 1500, 2000],
    line: [101, 505, 1010, 2020, 5050, 10100, 20200, 50500, 101000, 202000],
    scales: [100, 200, 500, 1000, 2000, 3000, 4000, 5000, 7500, 10000]
  };
  var SCHEDULES = { constant: "constant", "1cycle": "1cycle", cosine: "cosine", root: "lr / √t" };

  var COMMON = { schedule: "constant", beta1: 0.9, beta2: 0.999, second: 0.99, eps: 1e-8, tilt: 20 };
  var DEFAULTS = {
    valley: { steps: 300, lr: 0.1, lrSgd: 0.1, l2: 0, wd: 0, lines: ["sgd", "adam", "amsgrad"] },
    line: { steps: 101000, lr: 0.02, lrSgd: 1e-4, l2: 0, wd: 0, beta2: 0.99, second: 0.9999, lines: ["adam", "adam2", "amsgrad"] },
    scales: { steps: 5000, lr: 0.002, lrSgd: 0.002, l2: 0.003, wd: 0.3, lines: ["adam", "adamw"] }
  };

  /* A surface's settings, with changes. */
  function defaults(on, changes) {
    var lines = (changes && changes.lines) || DEFAULTS[on].lines;
    return Object.assign({ on: on }, COMMON, DEFAULTS[on], changes, { lines: lines.slice() });
  }

  /* The lessons: name, surface, changes to its defaults, and what to see. */
  var PRESETS = [
    ["One update", "valley", { lines: ["sgd", "sgdw"], beta1: 0, lrSgd: 1, l2: 0.02, wd: 0.02, steps: 400 },
      "Without momentum L2 and decay are one update, so the dashed line lies on the solid one; raise beta1 to 0.9, and they end in two places."],
    ["Turn the valley", "valley", { lines: ["sgd", "adam"], tilt: 0 },
      "Adam divides weight by weight, so a valley along an axis hardly slows it; tilt it to 45°, where both weights have gradients of one size, and Adam falls behind while SGD does as before."],
    ["L2 is divided by the gradient's scale", "scales", {},
      "Decay (orange) takes both kinds of weights to zero along the diagonal; L2 (blue) takes those with small gradients and lets go of those with large ones."],
    ["A stronger L2 is no decay", "scales", { l2: 0.3 },
      "With L2 as large as the decay, weights with large gradients shrink as under decay, but those with small gradients are at zero long before, one learning rate a step."],
    ["A schedule spends the decay", "scales", { schedule: "1cycle", lines: ["adamw"] },
      "Decay multiplies a weight by exp(−wd · sum of rates): under 1cycle the rates sum to half as much as at a constant rate, and the weights stop at 0.21 instead of 0.05."],
    ["Adam goes the wrong way, amsgrad does not", "line", { lines: ["adam", "amsgrad"] },
      "One gradient of 1010 sends both down and a hundred of −10 bring them up again, but period by period Adam gains height and ends at +1, the worst x, while amsgrad sinks towards the best."],
    ["A large beta2 mends Adam too", "line", { lines: ["adam", "adam2"] },
      "With beta2 = 0.9999 (light blue) Adam sinks to the best x without any maximum, and at 0.999 it still climbs: move the second beta2, the border is near 0.9995."]
  ];

  /* Settings as the part of an address behind "#": the surface, and what is not its default. */
  function toHash(settings) {
    var usual = defaults(settings.on), parts = ["on=" + settings.on];
    Object.keys(usual).forEach(function (key) {
      if (String(settings[key]) !== String(usual[key])) parts.push(key + "=" + settings[key]);
    });
    return parts.join("&");
  }

  /* Settings from such a part, or null if it is none. What makes no sense is left at its default. */
  function fromHash(text) {
    var given = {};
    text.replace(/^#/, "").split("&").forEach(function (part) {
      var at = part.indexOf("=");
      if (at > 0) given[part.slice(0, at)] = part.slice(at + 1).replace(/%2C/gi, ",");
    });
    if (!Object.prototype.hasOwnProperty.call(SURFACES, given.on)) return null;
    var settings = defaults(given.on);
    Object.keys(given).forEach(function (key) {
      var values = key === "steps" ? STEPS[given.on] : VALUES[key], number = Number(given[key]);
      if (key === "lines") {
        var known = given.lines.split(",").filter(function (line) {
          return Object.prototype.hasOwnProperty.call(LINES, line);
        });
        settings.lines = known;
      } else if (key === "schedule") {
        if (Object.prototype.hasOwnProperty.call(SCHEDULES, given.schedule)) settings.schedule = given.schedule;
      } else if (values && given[key] !== "" && number >= values[0] && number <= values[values.length - 1]) {
        settings[key] = key === "steps" ? Math.round(number) : number;
      }
    });
    return settings;
  }

  return {
    LINES: LINES, SURFACES: SURFACES, VALLEY: VALLEY, VALUES: VALUES, STEPS: STEPS,
    SCHEDULES: SCHEDULES, PRESETS: PRESETS, defaults: defaults, toHash: toHash, fromHash: fromHash,
    schedule: schedule, run: run, end: end, distance: distance, forecast: forecast
  };
})();
