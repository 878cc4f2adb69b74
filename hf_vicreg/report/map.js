// A map of images: pointing at a dot shows its image, choosing a class dims the others, dragging and buttons zoom.
(() => {
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3f7fbf", "#7a3b00", "#5a5a5a", "#7b3fa0", "#00838f"];
  const DARK = ["#56b4e9", "#f08a3c", "#3fc79a", "#e6a0c8", "#e8c840", "#8fb8f0", "#c98a5a", "#b0b0b0", "#c190e8", "#4fc3cf"];
  const SHAPES = ["circle", "square", "triangle", "diamond"];

  function dot(context, x, y, size, index, tone) {
    context.fillStyle = tone;
    context.beginPath();
    const form = SHAPES[index % SHAPES.length];
    if (form === "circle") context.arc(x, y, size, 0, 7);
    else if (form === "square") context.rect(x - size, y - size, 2 * size, 2 * size);
    else if (form === "triangle") [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]].forEach(([a, b]) => context.lineTo(x + a * size, y + b * size));
    else [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]].forEach(([a, b]) => context.lineTo(x + a * size, y + b * size));
    context.fill();
  }

  function widget(node, data) {
    const kinds = Object.keys(data.maps), tools = element("div", "tools"), stage = element("div", "map-stage");
    const canvas = element("canvas"), tip = element("div", "tip"), thumbnail = element("canvas"), words = element("div");
    const classes = element("div", "classes"), sheet = new Image();
    const state = { kind: kinds[kinds.length - 1], chosen: null, pointed: -1, x: 0, y: 0, zoom: 1 };
    tip.hidden = true;
    tip.append(thumbnail, words);
    stage.append(canvas, tip);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "A map of images");
    sheet.src = data.atlas;

    const buttons = kinds.map((kind) => {
      const button = element("button", "", kind);
      button.type = "button";
      button.addEventListener("click", () => {
        Object.assign(state, { kind, x: 0, y: 0, zoom: 1, pointed: -1 });
        draw();
      });
      return button;
    });
    const closer = element("button", "", "closer"), whole = element("button", "", "whole map");
    for (const one of [closer, whole]) one.type = "button";
    closer.addEventListener("click", () => look(state.zoom * 2, 0.5, 0.5));
    whole.addEventListener("click", () => {
      Object.assign(state, { x: 0, y: 0, zoom: 1 });
      draw();
    });
    if (kinds.length > 1) tools.append(...buttons);
    tools.append(closer, whole, element("span", "hint", "Point at a dot to see its image; drag to move, double-click to come closer."));
    node.append(tools, stage, classes);

    const counts = new Map();
    for (const label of data.labels || []) counts.set(label, (counts.get(label) || 0) + 1);
    const used = [...counts.keys()].sort((one, other) => one - other).slice(0, 40);
    const chips = used.map((label) => {
      const chip = element("button"), sample = element("canvas");
      chip.type = "button";
      chip.append(sample, element("span", "", data.classes[label]));
      chip.title = data.classes[label];
      chip.addEventListener("click", () => {
        state.chosen = state.chosen === label ? null : label;
        draw();
      });
      classes.append(chip);
      return { chip, sample, label };
    });

    const tone = (label) => (dark.matches ? DARK : LIGHT)[label % 10];

    function at(index) {
      const [x, y] = data.maps[state.kind][index];
      const pad = 14, width = state.width - 2 * pad, height = state.height - 2 * pad;
      return [pad + (x / 10000 - state.x) * state.zoom * width, pad + (y / 10000 - state.y) * state.zoom * height];
    }

    function look(zoom, shareX, shareY) {
      const next = Math.min(40, Math.max(1, zoom));
      state.x = Math.min(1 - 1 / next, Math.max(0, state.x + shareX / state.zoom - shareX / next));
      state.y = Math.min(1 - 1 / next, Math.max(0, state.y + shareY / state.zoom - shareY / next));
      state.zoom = next;
      draw();
    }

    function draw() {
      state.width = stage.clientWidth;
      if (!state.width) return;
      state.height = Math.round(Math.min(560, Math.max(300, state.width * 0.62)));
      const context = prepare(canvas, state.width, state.height);
      const size = Math.min(6, Math.max(2.5, 60 / Math.sqrt(data.names.length))) * Math.min(1.8, Math.sqrt(state.zoom));
      for (const later of [false, true]) {
        for (let index = 0; index < data.names.length; index++) {
          const label = data.labels ? data.labels[index] : 0;
          const on = state.chosen === null || label === state.chosen;
          if (on !== later) continue;
          context.globalAlpha = on ? 0.85 : 0.12;
          const [x, y] = at(index);
          if (x > -9 && y > -9 && x < state.width + 9 && y < state.height + 9) dot(context, x, y, size, label, tone(label));
        }
      }
      context.globalAlpha = 1;
      if (state.pointed >= 0) {
        const [x, y] = at(state.pointed);
        context.strokeStyle = colour("--ink");
        context.lineWidth = 2;
        context.beginPath();
        context.arc(x, y, size + 3, 0, 7);
        context.stroke();
      }
      kinds.forEach((kind, place) => buttons[place].setAttribute("aria-pressed", String(kind === state.kind)));
      whole.disabled = state.zoom === 1;
      for (const { chip, sample, label } of chips) {
        dot(prepare(sample, 12, 12), 6, 6, 4.5, label, tone(label));
        chip.setAttribute("aria-pressed", String(state.chosen === label));
      }
    }

    function point(event) {
      const area = canvas.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
      let best = -1, least = 22 ** 2;
      for (let index = 0; index < data.names.length; index++) {
        if (state.chosen !== null && data.labels[index] !== state.chosen) continue;
        const [atX, atY] = at(index), far = (atX - x) ** 2 + (atY - y) ** 2;
        if (far < least) [best, least] = [index, far];
      }
      if (best !== state.pointed) {
        state.pointed = best;
        draw();
        show();
      }
    }

    function show() {
      tip.hidden = state.pointed < 0;
      if (tip.hidden) return;
      const context = prepare(thumbnail, 96, 96), side = data.side;
      context.drawImage(sheet, (state.pointed % data.columns) * side, Math.floor(state.pointed / data.columns) * side, side, side, 0, 0, 96, 96);
      words.textContent = data.names[state.pointed];
      const [x, y] = at(state.pointed);
      tip.style.left = Math.max(0, x > state.width / 2 ? x - tip.offsetWidth - 14 : Math.min(x + 14, state.width - tip.offsetWidth)) + "px";
      tip.style.top = Math.max(0, Math.min(y - 40, state.height - tip.offsetHeight)) + "px";
    }

    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && state.zoom > 1) {
        held = [event.clientX, event.clientY];
        canvas.setPointerCapture(event.pointerId);
      }
      point(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held) {
        state.x = Math.min(1 - 1 / state.zoom, Math.max(0, state.x - (event.clientX - held[0]) / state.width / state.zoom));
        state.y = Math.min(1 - 1 / state.zoom, Math.max(0, state.y - (event.clientY - held[1]) / state.height / state.zoom));
        held = [event.clientX, event.clientY];
        state.pointed = -1;
        tip.hidden = true;
        draw();
      } else point(event);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (held = null));
    canvas.addEventListener("pointerleave", () => {
      state.pointed = -1;
      tip.hidden = true;
      draw();
    });
    canvas.addEventListener("dblclick", (event) => {
      const area = canvas.getBoundingClientRect();
      look(state.zoom * 2, (event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
    });
    whenResized(stage, draw);
  }

  for (const node of document.querySelectorAll(".map")) {
    const data = content.maps[Number(node.dataset.run)];
    if (data) widget(node, data);
  }
})();
