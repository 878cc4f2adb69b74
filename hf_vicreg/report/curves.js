// Curves with one time for all: pointing at one reads them all, dragging across one zooms them all.
(() => {
  const place = document.getElementById("curves");
  if (!place) return;
  const space = "http://www.w3.org/2000/svg";
  const left = 46, right = 10, top = 10, bottom = 22, height = 190;
  const reset = document.getElementById("reset-zoom");
  const lasts = content.panels.flatMap((panel) => panel.curves.map((curve) => curve.steps[curve.steps.length - 1]));
  const whole = [0, Math.max(1, ...lasts)];
  let range = whole, pointed = null;

  const panels = content.panels.map((panel, index) => {
    const node = place.children[index];
    const labels = [...new Set(panel.curves.map((curve) => curve.label))];
    const several = content.runs.length > 1;
    const curves = panel.curves.map((curve) => ({
      ...curve,
      key: labels.length === 1 && several ? curve.run : labels.indexOf(curve.label) % 6,
      dashed: labels.length > 1 && curve.run === 1,
      name: several ? (labels.length === 1 ? content.runs[curve.run] : curve.label + ", " + content.runs[curve.run]) : curve.label,
    }));
    const legend = node.querySelector(".legend");
    for (const curve of curves) {
      const item = element("li");
      item.append(element("span", "swatch k" + curve.key + (curve.dashed ? " dashed" : "")), element("span", "", curve.name));
      curve.readout = element("span", "number");
      item.append(curve.readout);
      legend.append(item);
    }
    return { ...panel, curves, svg: node.querySelector("svg") };
  });

  function shape(name, attributes, kind) {
    const made = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (kind) made.setAttribute("class", kind);
    return made;
  }

  // Round numbers between two, about `count` of them.
  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((one) => one * power >= raw);
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at++) found.push(at * step);
    return found;
  }

  // Places in a curve's lists that are drawn: those in the range, and one beyond it on either side.
  function within(curve) {
    let first = curve.steps.findIndex((step) => step >= range[0]);
    if (first < 0) first = curve.steps.length;
    let end = curve.steps.findIndex((step) => step > range[1]);
    if (end < 0) end = curve.steps.length;
    return [Math.max(0, first - 1), Math.min(curve.steps.length, end + 1)];
  }

  function scales(panel, width) {
    let low = Infinity, high = -Infinity;
    for (const curve of panel.curves) {
      const [first, end] = within(curve);
      for (let at = first; at < end; at++) {
        low = Math.min(low, curve.values[at]);
        high = Math.max(high, curve.values[at]);
      }
    }
    for (const { value } of panel.levels) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) [low, high] = [0, 1];
    const bend = panel.log ? Math.log10 : (value) => value;
    let bottomValue = bend(low), topValue = bend(high);
    if (!panel.log && bottomValue > 0 && bottomValue < 0.6 * topValue) bottomValue = 0;
    const spare = (topValue - bottomValue || Math.abs(topValue) || 1) * 0.06;
    topValue += spare;
    if (bottomValue !== 0) bottomValue -= spare;
    return {
      x: (step) => left + ((step - range[0]) / (range[1] - range[0])) * (width - left - right),
      y: (value) => top + (1 - (bend(value) - bottomValue) / (topValue - bottomValue)) * (height - top - bottom),
      ticks: panel.log
        ? logTicks(bottomValue, topValue)
        : ticks(bottomValue, topValue, 4),
    };
  }

  function logTicks(low, high) {
    const factors = high - low > 3 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const factor of factors) {
        const at = power + Math.log10(factor);
        if (at >= low && at <= high) found.push(10 ** at);
      }
    }
    return found;
  }

  function draw(panel) {
    const width = panel.svg.clientWidth;
    if (!width) return;
    panel.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const scale = (panel.scale = scales(panel, width));
    const parts = [];
    for (const value of scale.ticks) {
      const y = scale.y(value);
      parts.push(shape("line", { x1: left, x2: width - right, y1: y, y2: y }, "grid"));
      const text = shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" });
      text.textContent = figure(+value.toPrecision(6));
      parts.push(text);
    }
    for (const value of ticks(range[0], range[1], Math.max(2, Math.floor(width / 55)))) {
      const text = shape("text", { x: scale.x(value), y: height - 5, "text-anchor": "middle" });
      text.textContent = figure(value);
      parts.push(text);
    }
    for (const level of panel.levels) {
      const y = scale.y(level.value), text = shape("text", { x: width - right, y: y - 5, "text-anchor": "end" });
      text.textContent = level.label + " " + figure(level.value);
      parts.push(shape("line", { x1: left, x2: width - right, y1: y, y2: y }, "cross"), text);
    }
    const clip = shape("svg", { x: left, y: 0, width: Math.max(1, width - left - right + 4), height, viewBox: `${left} 0 ${Math.max(1, width - left - right + 4)} ${height}` });
    for (const curve of panel.curves) {
      const [first, end] = within(curve);
      let path = "";
      for (let at = first; at < end; at++) {
        path += `${path ? "L" : "M"}${scale.x(curve.steps[at]).toFixed(1)} ${scale.y(curve.values[at]).toFixed(1)}`;
      }
      clip.append(shape("path", { d: path }, `curve k${curve.key}${curve.dashed ? " dashed" : ""}`));
      if (end - first <= 24) {
        for (let at = first; at < end; at++) {
          clip.append(shape("circle", { cx: scale.x(curve.steps[at]), cy: scale.y(curve.values[at]), r: 3 }, `dot k${curve.key}`));
        }
      }
    }
    panel.marks = shape("g", {});
    panel.svg.replaceChildren(...parts, clip, panel.marks);
    read(panel);
  }

  function nearest(curve, step) {
    let low = 0, high = curve.steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (curve.steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - curve.steps[low - 1] < curve.steps[low] - step ? low - 1 : low;
  }

  // The values at the step that is pointed at, or at the last one.
  function read(panel) {
    if (!panel.marks) return;
    const marks = [];
    for (const curve of panel.curves) {
      const at = nearest(curve, pointed === null ? range[1] : pointed);
      curve.readout.textContent = figure(curve.values[at]);
      if (pointed !== null && curve.steps[at] >= range[0] && curve.steps[at] <= range[1]) {
        marks.push(shape("circle", { cx: panel.scale.x(curve.steps[at]), cy: panel.scale.y(curve.values[at]), r: 4 }, `dot k${curve.key}`));
      }
    }
    if (pointed !== null) {
      const x = panel.scale.x(pointed), width = panel.svg.clientWidth;
      marks.unshift(shape("line", { x1: x, x2: x, y1: top, y2: height - bottom }, "cross"));
      const text = shape("text", { x: Math.min(width - 40, Math.max(left + 34, x)), y: 9, "text-anchor": "middle" });
      text.textContent = "step " + Math.round(pointed).toLocaleString("en");
      marks.push(text);
    }
    panel.marks.replaceChildren(...marks);
  }

  function zoom(part) {
    range = part;
    reset.disabled = range === whole;
    pointed = null;
    panels.forEach(draw);
  }

  for (const panel of panels) {
    const step = (event) => {
      const box = panel.svg.getBoundingClientRect();
      const share = (event.clientX - box.left - left) / (box.width - left - right);
      return range[0] + Math.min(1, Math.max(0, share)) * (range[1] - range[0]);
    };
    let from = null;
    panel.svg.addEventListener("pointerdown", (event) => {
      if (event.button === 0) {
        from = step(event);
        panel.svg.setPointerCapture(event.pointerId);
      }
    });
    panel.svg.addEventListener("pointermove", (event) => {
      pointed = step(event);
      panels.forEach(read);
      if (from !== null) {
        const [one, other] = [from, pointed].map(panel.scale.x);
        panel.marks.append(shape("rect", { x: Math.min(one, other), width: Math.abs(one - other), y: top, height: height - top - bottom }, "brush"));
      }
    });
    panel.svg.addEventListener("pointerup", (event) => {
      const to = step(event);
      if (from !== null && Math.abs(panel.scale.x(to) - panel.scale.x(from)) > 12) zoom([Math.min(from, to), Math.max(from, to)]);
      from = null;
    });
    panel.svg.addEventListener("pointercancel", () => (from = null));
    panel.svg.addEventListener("pointerleave", () => {
      if (from !== null) return;
      pointed = null;
      panels.forEach(read);
    });
    panel.svg.addEventListener("dblclick", () => zoom(whole));
    whenResized(panel.svg, () => draw(panel));
  }
  reset.addEventListener("click", () => zoom(whole));
})();
