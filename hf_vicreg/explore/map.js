"use strict";
// The map: dragging moves it, wheel, pinch and buttons zoom, a box selects. Of many images it draws as many as stay
// fluid, always the same ones, and more of them the closer one comes; of few in view it draws the images themselves.
const TONES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3f7fbf", "#7a3b00", "#5a5a5a", "#7b3fa0", "#00838f"],
  dark: ["#56b4e9", "#f08a3c", "#3fc79a", "#e6a0c8", "#e8c840", "#8fb8f0", "#c98a5a", "#b0b0b0", "#c190e8", "#4fc3cf"],
};
const tone = (index) => (dark.matches ? TONES.dark : TONES.light)[index % 10];
const MOST_DRAWN = 20000, MOST_MOVING = 8000, MOST_PICTURES = 90, MOST_ZOOM = 400, PAD = 16;

function makeMap(app) {
  const stage = document.getElementById("stage"), canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
  const view = { x: 0, y: 0, zoom: 1, width: 0, height: 0 };
  const pictures = new Map(), held = new Map();
  let points = new Uint16Array(0), order = new Uint32Array(0), shown = [], pointed = -1, moving = 0, boxed = null, asked = 0, frame = 0, pinch = 0, moved = false;
  const map = { boxing: false, setPoints, draw: later, zoomBy: (factor) => look(view.zoom * factor, 0.5, 0.5), whole, focus, view, at, shown: () => shown };

  function setPoints(found) {
    points = found;
    if (order.length !== points.length / 2) {
      order = Uint32Array.from({ length: points.length / 2 }, (_, row) => row);
      let seed = 1; // the same order every time: what is drawn must not change from visit to visit
      for (let place = order.length - 1; place > 0; place--) {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
        const other = seed % (place + 1), kept = order[place];
        order[place] = order[other];
        order[other] = kept;
      }
    }
    whole();
  }

  function whole() {
    Object.assign(view, { x: 0, y: 0, zoom: 1 });
    later();
  }

  function at(row) {
    return [
      PAD + (points[2 * row] / 65535 - view.x) * view.zoom * (view.width - 2 * PAD),
      PAD + (points[2 * row + 1] / 65535 - view.y) * view.zoom * (view.height - 2 * PAD),
    ];
  }

  function look(zoom, shareX, shareY) {
    const next = Math.min(MOST_ZOOM, Math.max(1, zoom));
    const inside = (value) => Math.min(1 - 1 / next, Math.max(0, value));
    view.x = inside(view.x + shareX / view.zoom - shareX / next);
    view.y = inside(view.y + shareY / view.zoom - shareY / next);
    view.zoom = next;
    later();
  }

  function focus(row) {
    const half = 0.5 / view.zoom, inside = (value) => Math.min(1 - 2 * half, Math.max(0, value));
    view.x = inside(points[2 * row] / 65535 - half);
    view.y = inside(points[2 * row + 1] / 65535 - half);
    later();
  }

  function later() {
    if (!frame) frame = requestAnimationFrame(() => ((frame = 0), draw()));
  }

  function nudge() {
    clearTimeout(moving);
    moving = setTimeout(() => ((moving = 0), later()), 160);
    later();
  }

  function draw() {
    view.width = stage.clientWidth;
    if (!view.width) return;
    view.height = Math.round(view.width < 600 ? Math.min(view.width, innerHeight * 0.6) : Math.max(320, Math.min(view.width * 0.85, innerHeight - 190)));
    const context = prepare(canvas, view.width, view.height), most = moving ? MOST_MOVING : MOST_DRAWN;
    const byTone = new Map();
    let inView = 0;
    shown = [];
    const scaleX = (view.zoom * (view.width - 2 * PAD)) / 65535, scaleY = (view.zoom * (view.height - 2 * PAD)) / 65535;
    const [startX, startY] = [PAD - view.x * scaleX * 65535, PAD - view.y * scaleY * 65535];
    for (let place = 0; place < order.length; place++) { // as `at`, without making a hundred thousand pairs
      const row = order[place], x = startX + points[2 * row] * scaleX, y = startY + points[2 * row + 1] * scaleY;
      if (x < -6 || y < -6 || x > view.width + 6 || y > view.height + 6) continue;
      inView++;
      if (shown.length >= most) continue;
      shown.push(row);
      const kind = app.kindOf(row);
      if (!byTone.has(kind)) byTone.set(kind, []);
      byTone.get(kind).push(x, y);
    }
    const close = app.about.has_images && inView <= MOST_PICTURES;
    const size = Math.min(5, Math.max(1.4, 70 / Math.sqrt(shown.length + 1))) * Math.min(1.6, view.zoom ** 0.25);
    for (const faint of [true, false]) {
      for (const [kind, places] of byTone) {
        if (kind.faint !== faint) continue;
        context.globalAlpha = faint ? 0.25 : 0.85;
        context.fillStyle = kind.tone === null ? colour("--soft") : tone(kind.tone);
        for (let one = 0; one < places.length; one += 2) context.fillRect(places[one] - size, places[one + 1] - size, 2 * size, 2 * size);
      }
    }
    context.globalAlpha = 1;
    if (close) for (const row of [...shown].reverse()) drawPicture(context, row);
    ring(context, app.found, "--ink", size + 3, 1.5, close);
    ring(context, app.selected, "--c1", size + 2, 2.5, close);
    if (app.picked >= 0) ring(context, [app.picked], "--ink", size + 6, 3, close);
    if (pointed >= 0) ring(context, [pointed], "--ink", size + 4, 2, close);
    if (boxed) {
      const [left, top, right, bottom] = boxed;
      context.globalAlpha = 0.15;
      context.fillStyle = colour("--c1");
      context.fillRect(left, top, right - left, bottom - top);
      context.globalAlpha = 1;
      context.strokeStyle = colour("--c1");
      context.strokeRect(left, top, right - left, bottom - top);
    }
    app.drawn(shown.length, inView, close);
  }

  function drawPicture(context, row) {
    let picture = pictures.get(row);
    if (!picture) {
      if (pictures.size > 1500) pictures.clear();
      picture = new Image();
      picture.onload = later;
      picture.src = `image/${row}?side=96`;
      pictures.set(row, picture);
    }
    if (!picture.complete || !picture.naturalWidth) return;
    const [x, y] = at(row), scale = 40 / Math.max(picture.naturalWidth, picture.naturalHeight);
    const width = picture.naturalWidth * scale, height = picture.naturalHeight * scale, kind = app.kindOf(row);
    context.globalAlpha = kind.faint ? 0.35 : 1;
    context.fillStyle = kind.tone === null ? colour("--soft") : tone(kind.tone);
    context.fillRect(x - width / 2 - 2, y - height / 2 - 2, width + 4, height + 4);
    context.drawImage(picture, x - width / 2, y - height / 2, width, height);
    context.globalAlpha = 1;
  }

  function ring(context, rows, name, size, width, close) {
    context.strokeStyle = colour(name);
    context.lineWidth = width;
    let drawn = 0;
    for (const row of rows) {
      const [x, y] = at(row), half = close ? 23 : size;
      if (x < -9 || y < -9 || x > view.width + 9 || y > view.height + 9 || drawn++ > 5000) continue;
      context.strokeRect(x - half, y - half, 2 * half, 2 * half);
    }
  }

  function nearest(x, y) {
    let best = -1, least = (app.about.has_images && shown.length <= MOST_PICTURES ? 24 : 16) ** 2;
    for (const row of shown) {
      const [atX, atY] = at(row), far = (atX - x) ** 2 + (atY - y) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best;
  }

  function place(event) {
    const area = canvas.getBoundingClientRect();
    return [event.clientX - area.left, event.clientY - area.top];
  }

  async function point(event) {
    const row = nearest(...place(event));
    if (row === pointed) return;
    pointed = row;
    later();
    if (row < 0) {
      tip.hidden = true;
      return;
    }
    const turn = ++asked, name = await app.nameOf(row);
    if (turn !== asked || pointed !== row) return;
    const words = element("div", "", name);
    tip.replaceChildren(...(app.about.has_images ? [app.imageOf(row)] : []), words);
    tip.hidden = false;
    const [x, y] = at(row);
    tip.style.left = Math.max(0, x > view.width / 2 ? x - tip.offsetWidth - 14 : Math.min(x + 14, view.width - tip.offsetWidth)) + "px";
    tip.style.top = Math.max(0, Math.min(y - 40, view.height - tip.offsetHeight)) + "px";
  }

  function within([left, top, right, bottom]) {
    const found = [];
    for (let row = 0; row < order.length; row++) {
      const [x, y] = at(row);
      if (x >= Math.min(left, right) && x <= Math.max(left, right) && y >= Math.min(top, bottom) && y <= Math.max(top, bottom)) found.push(row);
    }
    return found;
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, place(event));
    moved = false;
    pinch = 0;
    if (held.size === 1 && (map.boxing || event.shiftKey)) boxed = [...place(event), ...place(event)];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held.has(event.pointerId)) return point(event);
    const [beforeX, beforeY] = held.get(event.pointerId), [x, y] = place(event);
    if (!moved && Math.hypot(x - beforeX, y - beforeY) < 4) return;
    moved = true;
    held.set(event.pointerId, [x, y]);
    pointed = -1;
    tip.hidden = true;
    if (held.size === 2) {
      const [one, other] = [...held.values()], far = Math.hypot(one[0] - other[0], one[1] - other[1]);
      if (pinch) look((view.zoom * far) / pinch, (one[0] + other[0]) / 2 / view.width, (one[1] + other[1]) / 2 / view.height);
      pinch = far;
      boxed = null;
    } else if (boxed) boxed = [boxed[0], boxed[1], x, y];
    else {
      const inside = (value) => Math.min(1 - 1 / view.zoom, Math.max(0, value));
      view.x = inside(view.x - (x - beforeX) / (view.width - 2 * PAD) / view.zoom);
      view.y = inside(view.y - (y - beforeY) / (view.height - 2 * PAD) / view.zoom);
    }
    nudge();
  });
  canvas.addEventListener("pointerup", (event) => {
    held.delete(event.pointerId);
    const box = boxed;
    boxed = null;
    if (box && moved) app.select(within(box), true);
    else if (!moved) {
      const row = nearest(...place(event));
      if (row >= 0) app.pick(row);
    }
    later();
  });
  canvas.addEventListener("pointercancel", (event) => {
    held.delete(event.pointerId);
    boxed = null;
  });
  canvas.addEventListener("pointerleave", () => {
    pointed = -1;
    tip.hidden = true;
    later();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const [x, y] = place(event);
      look(view.zoom * 1.0018 ** -Math.max(-240, Math.min(240, event.deltaY)), x / view.width, y / view.height);
      nudge();
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    const step = 0.1 / view.zoom, inside = (value) => Math.min(1 - 1 / view.zoom, Math.max(0, value));
    const ways = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (ways[event.key]) Object.assign(view, { x: inside(view.x + ways[event.key][0]), y: inside(view.y + ways[event.key][1]) });
    else if (event.key === "+") map.zoomBy(1.5);
    else if (event.key === "-") map.zoomBy(1 / 1.5);
    else return;
    event.preventDefault();
    nudge();
  });
  whenResized(stage, draw);
  return map;
}
