// Attention: a patch is picked, and every head of every layer shows where it looks from there.
(() => {
  const HEAT = [[13, 8, 60], [84, 15, 109], [156, 46, 99], [214, 83, 63], [246, 145, 32], [252, 218, 109], [252, 255, 200]];

  function heat(share) {
    const at = Math.min(1, Math.max(0, share)) * (HEAT.length - 1), low = Math.min(HEAT.length - 2, Math.floor(at));
    return "rgb(" + HEAT[low].map((one, channel) => Math.round(one + (at - low) * (HEAT[low + 1][channel] - one))) + ")";
  }

  function numbers(text) {
    const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  function widget(node, data) {
    for (const item of data.items) item.numbers = numbers(item.weights);
    const state = { item: data.items[0], query: 0, layer: data.items[0].shape[0] - 1, head: 0, pattern: true };
    const choices = element("div", "choices"), picker = element("div", "picker"), side = element("div");
    const image = element("canvas"), readout = element("p", "readout"), key = element("div", "pattern-key");
    image.tabIndex = 0;
    image.setAttribute("role", "img");
    image.setAttribute("aria-label", "The image; pick a patch by pointer or arrow keys");
    const options = element("div", "choices");
    const heads = element("div", "heads"), headings = element("p", "hint", "Bright: looked at most, each map by its own largest value. Pick a map to see it large.");
    picker.append(choices, image, readout, options, key);
    side.append(headings, heads);
    node.append(picker, side);

    const pictures = new Map();
    let size = "";
    for (const item of data.items) {
      if (item.size !== size) choices.append(element("p", "hint size", (size = item.size) + ", " + item.grid.join("x") + " patches"));
      const button = element("button", "image");
      const picture = element("img");
      picture.src = item.image;
      picture.alt = item.name + ", " + item.size;
      button.title = picture.alt;
      button.type = "button";
      button.append(picture);
      button.addEventListener("click", () => choose(item));
      choices.append(button);
      pictures.set(item, { button, picture });
      picture.addEventListener("load", () => item === state.item && draw());
    }
    const cls = element("button", "", "look from CLS"), pattern = element("button", "", "show the pattern");
    for (const one of [cls, pattern]) one.type = "button";
    cls.addEventListener("click", () => pick(state.item.queries.indexOf(-1)));
    pattern.addEventListener("click", () => {
      state.pattern = !state.pattern;
      draw();
    });
    options.append(cls, pattern);
    for (const [letter, words] of [["q", "its own tile"], ["g", "global"], ["l", "local"], ["r", "random"], ["none", "forbidden: exactly 0"]]) {
      const part = element("span");
      part.append(element("i", "i-" + letter), words);
      key.append(part);
    }

    // Attention from the picked query to each patch, and to the tokens before them together.
    function row(layer, head) {
      const [, numHeads, queries, tokens] = state.item.shape;
      const start = ((layer * numHeads + head) * queries + state.query) * tokens;
      const all = state.item.numbers.subarray(start, start + tokens);
      return { patches: all.subarray(state.item.leading), leading: all.subarray(0, state.item.leading).reduce((sum, one) => sum + one, 0) };
    }

    function levels(layer) {
      return state.item.levels.length ? state.item.levels[layer][state.query] : null;
    }

    function choose(item) {
      const before = state.item.queries[state.query];
      const share = before < 0 ? 0.4 : (before + 0.5) / (state.item.grid[0] * state.item.grid[1]);
      state.item = item;
      state.layer = Math.min(state.layer, item.shape[0] - 1);
      const patches = item.queries.map((one, at) => [one, at]).filter(([one]) => one >= 0);
      state.query = patches[Math.min(patches.length - 1, Math.floor(share * patches.length))][1];
      build();
    }

    function pick(query) {
      if (query < 0) return;
      state.query = query;
      draw();
    }

    // The query nearest to a patch: where there are too many patches, only some of them look.
    function nearestQuery(rowAt, columnAt) {
      const columns = state.item.grid[1];
      let best = -1, least = Infinity;
      state.item.queries.forEach((patch, at) => {
        if (patch < 0) return;
        const far = (Math.floor(patch / columns) - rowAt) ** 2 + ((patch % columns) - columnAt) ** 2;
        if (far < least) [best, least] = [at, far];
      });
      return best;
    }

    function build() {
      const [numLayers, numHeads] = state.item.shape;
      heads.replaceChildren();
      heads.style.gridTemplateColumns = `auto repeat(${numHeads}, minmax(0, 130px))`;
      heads.append(element("span"));
      for (let head = 0; head < numHeads; head++) heads.append(element("span", "name top", numHeads > 8 ? head : "head " + head));
      state.maps = [];
      for (let layer = 0; layer < numLayers; layer++) {
        heads.append(element("span", "name", numHeads > 8 ? layer : "layer " + layer));
        for (let head = 0; head < numHeads; head++) {
          const map = element("canvas");
          map.title = `layer ${layer}, head ${head}`;
          map.tabIndex = 0;
          map.setAttribute("role", "button");
          const take = () => {
            [state.layer, state.head] = [layer, head];
            draw();
          };
          map.addEventListener("click", take);
          map.addEventListener("keydown", (event) => {
            if (event.key === "Enter" || event.key === " ") {
              event.preventDefault();
              take();
            }
          });
          heads.append(map);
          state.maps.push({ map, layer, head });
        }
      }
      draw();
    }

    function box(context, width) {
      const [rows, columns] = state.item.grid;
      const height = Math.round((width * rows) / columns);
      return [width / columns, height / rows, height];
    }

    function drawHeat(map, layer, head) {
      const width = map.clientWidth || 60, [rows, columns] = state.item.grid;
      const height = Math.round((width * rows) / columns);
      const context = prepare(map, width, height);
      const { patches } = row(layer, head), seen = levels(layer);
      const most = Math.max(...patches) || 1, across = width / columns, down = height / rows;
      for (let at = 0; at < patches.length; at++) {
        const x = (at % columns) * across, y = Math.floor(at / columns) * down;
        context.fillStyle = seen && seen[at] === "." ? colour("--well") : heat(patches[at] / most);
        context.fillRect(x, y, across + 0.5, down + 0.5);
        if (seen && seen[at] === "." && across > 5) hatch(context, x, y, across, down);
      }
      mark(context, across, down);
      map.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
    }

    function hatch(context, x, y, across, down) {
      context.save();
      context.beginPath();
      context.rect(x, y, across, down);
      context.clip();
      context.strokeStyle = colour("--soft");
      context.globalAlpha = 0.45;
      context.lineWidth = 1;
      context.beginPath();
      for (let at = -down; at < across; at += 5) {
        context.moveTo(x + at, y + down);
        context.lineTo(x + at + down, y);
      }
      context.stroke();
      context.restore();
    }

    function mark(context, across, down) {
      const patch = state.item.queries[state.query];
      if (patch < 0) return;
      const columns = state.item.grid[1];
      context.lineWidth = Math.max(1.5, across / 12);
      context.strokeStyle = "#fff";
      context.strokeRect((patch % columns) * across + 1, Math.floor(patch / columns) * down + 1, across - 2, down - 2);
      context.lineWidth /= 2;
      context.strokeStyle = "#000";
      context.strokeRect((patch % columns) * across + 1, Math.floor(patch / columns) * down + 1, across - 2, down - 2);
    }

    function drawImage() {
      const width = image.clientWidth || 300, [rows, columns] = state.item.grid;
      const height = Math.round((width * rows) / columns), across = width / columns, down = height / rows;
      const context = prepare(image, width, height);
      const { picture } = pictures.get(state.item);
      if (picture.complete && picture.naturalWidth) context.drawImage(picture, 0, 0, width, height);
      const seen = levels(state.layer), { patches } = row(state.layer, state.head), most = Math.max(...patches) || 1;
      for (let at = 0; at < patches.length; at++) {
        const x = (at % columns) * across, y = Math.floor(at / columns) * down;
        if (seen && seen[at] === ".") {
          context.fillStyle = colour("--ground");
          context.globalAlpha = 0.55;
          context.fillRect(x, y, across, down);
          context.globalAlpha = 1;
          if (state.pattern && across > 5) hatch(context, x, y, across, down);
        } else {
          context.fillStyle = heat(patches[at] / most);
          context.globalAlpha = 0.15 + 0.65 * (patches[at] / most);
          context.fillRect(x, y, across, down);
          context.globalAlpha = 1;
        }
      }
      if (seen && state.pattern && state.item.queries[state.query] >= 0) outline(context, seen, across, down);
      mark(context, across, down);
    }

    // A line of the level's colour around each tile that is seen.
    function outline(context, seen, across, down) {
      const [rows, columns] = state.item.grid, tiles = state.item.tiles;
      const colours = { q: colour("--ink"), g: colour("--global"), l: colour("--local"), r: colour("--random") };
      context.lineWidth = 3;
      for (let at = 0; at < tiles.length; at++) {
        if (seen[at] === ".") continue;
        const x = (at % columns) * across, y = Math.floor(at / columns) * down;
        context.strokeStyle = colours[seen[at]];
        const sides = [
          [at % columns === 0 || tiles[at - 1] !== tiles[at], [x + 1.5, y, x + 1.5, y + down]],
          [at % columns === columns - 1 || tiles[at + 1] !== tiles[at], [x + across - 1.5, y, x + across - 1.5, y + down]],
          [at < columns || tiles[at - columns] !== tiles[at], [x, y + 1.5, x + across, y + 1.5]],
          [at >= (rows - 1) * columns || tiles[at + columns] !== tiles[at], [x, y + down - 1.5, x + across, y + down - 1.5]],
        ];
        for (const [edge, line] of sides) {
          if (!edge) continue;
          context.beginPath();
          context.moveTo(line[0], line[1]);
          context.lineTo(line[2], line[3]);
          context.stroke();
        }
      }
    }

    function say(at) {
      const patch = state.item.queries[state.query], columns = state.item.grid[1];
      const { patches, leading } = row(state.layer, state.head), seen = levels(state.layer);
      const named = (one) => `row ${Math.floor(one / columns)}, column ${one % columns}`;
      const words = { q: "its own tile", g: "global", l: "local", r: "random", ".": "forbidden" };
      let text = `Layer ${state.layer}, head ${state.head}, from ${patch < 0 ? "CLS" : named(patch)}`;
      if (at === undefined) {
        text += state.item.leading ? `: ${figure(100 * leading)}% to CLS and registers, the rest to patches.` : ".";
      } else {
        text += ` to ${named(at)}: ${patches[at].toPrecision(4) * 1}${seen ? " (" + words[seen[at]] + ")" : ""}`;
        readout.dataset.value = patches[at];
      }
      readout.textContent = text;
    }

    function draw() {
      for (const [item, { button }] of pictures) button.setAttribute("aria-pressed", String(item === state.item));
      const sparse = state.item.levels.length > 0;
      pattern.hidden = key.hidden = !sparse;
      pattern.setAttribute("aria-pressed", String(state.pattern));
      cls.hidden = state.item.queries.indexOf(-1) < 0;
      cls.setAttribute("aria-pressed", String(state.item.queries[state.query] < 0));
      drawImage();
      for (const { map, layer, head } of state.maps) drawHeat(map, layer, head);
      node.dataset.query = state.item.queries[state.query];
      say();
    }

    const under = (event) => {
      const area = image.getBoundingClientRect(), [rows, columns] = state.item.grid;
      const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      return [at((event.clientY - area.top) / area.height, rows), at((event.clientX - area.left) / area.width, columns)];
    };
    image.addEventListener("click", (event) => pick(nearestQuery(...under(event))));
    image.addEventListener("pointermove", (event) => {
      const [rowAt, columnAt] = under(event);
      say(rowAt * state.item.grid[1] + columnAt);
    });
    image.addEventListener("pointerleave", () => say());
    image.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const patch = state.item.queries[state.query], [rows, columns] = state.item.grid;
      let [rowAt, columnAt] = patch < 0 ? [0, 0] : [Math.floor(patch / columns), patch % columns];
      for (let next = state.query; next === state.query; next = nearestQuery(rowAt, columnAt)) {
        rowAt += step[0];
        columnAt += step[1];
        if (rowAt < 0 || columnAt < 0 || rowAt >= rows || columnAt >= columns) return;
      }
      pick(nearestQuery(rowAt, columnAt));
    });
    choose(data.items[0]);
    whenResized(node, draw);
  }

  window.showAttention = widget;
  for (const node of document.querySelectorAll(".attention")) {
    const data = content.attention[Number(node.dataset.run)];
    if (data && data.items.length) widget(node, data);
  }
})();
