"use strict";
// The page: what is known of the set, what is selected, and the panels. The server only answers; what is clicked is kept here.
const app = {
  about: null, map: null, selected: new Set(), found: [], picked: -1, lit: null, labels: null, least: 80,
  clusters: new Uint16Array(0), colours: "clusters", names: new Map(),
};
const TOUCH = matchMedia("(pointer: coarse)");
const kinds = new Map(); // one object a look, so that the map can gather what looks alike
function kind(tone, faint) {
  const key = `${tone}/${faint}`;
  if (!kinds.has(key)) kinds.set(key, { tone, faint });
  return kinds.get(key);
}

app.kindOf = (row) => {
  if (app.colours === "labels" && app.labels) {
    const one = app.labels.classes[row];
    return one < 0 || app.labels.sure[row] < app.least ? kind(null, true) : kind(one, false);
  }
  const one = app.clusters[row];
  return kind(one % 10, app.lit !== null && one !== app.lit);
};

app.tell = (text) => {
  const node = document.getElementById("trouble");
  node.textContent = text;
  node.hidden = false;
  clearTimeout(app.telling);
  app.telling = setTimeout(() => (node.hidden = true), 6000);
};

async function fetched(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    app.tell("The server does not answer. Is it still running?");
    return null;
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  app.tell(told.error || `The server answers ${answer.status}.`);
  return null;
}

app.ask = async (path, options) => (await fetched(path, options))?.json();

app.save = async (path, options) => {
  const answer = await fetched(path, options);
  if (!answer) return;
  const link = element("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = path;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

app.nameOf = async (row) => {
  if (!app.names.has(row)) app.names.set(row, app.ask(`name/${row}`).then((found) => found?.name ?? `image ${row}`));
  return app.names.get(row);
};

app.imageOf = (row, side = 96) => {
  const made = element("img");
  made.loading = "lazy";
  made.alt = "";
  made.src = `image/${row}?side=${side}`;
  return made;
};

app.rowsOf = (number) => [...app.clusters.keys()].filter((row) => app.clusters[row] === number);

app.select = (rows, on) => {
  for (const row of rows) on ? app.selected.add(row) : app.selected.delete(row);
  for (const node of document.querySelectorAll(".tile")) mark(app, node);
  const bar = document.getElementById("bar"), count = app.selected.size;
  bar.hidden = !count;
  bar.replaceChildren(
    element("b", "", plural(count, "image")),
    button("List of files", () => app.save("files.txt", { method: "POST", body: JSON.stringify({ rows: [...app.selected].sort((one, other) => one - other) }) })),
    button("Label", () => (app.open("labels"), document.getElementById("label").focus())),
    button("Clear", () => app.select([...app.selected], false)),
  );
  app.map.draw();
};

app.colouring = (name) => {
  app.colours = name;
  app.map.draw();
};

app.drawn = (shown, inView, close) => {
  const thin = shown < inView ? `${shown.toLocaleString("en")} of the ${inView.toLocaleString("en")} images in view are drawn, come closer for more. ` : "";
  document.getElementById("map-hint").textContent = `${thin}${close ? "" : "Point at a dot to see its image, click it for those alike. "}${TOUCH.matches ? "Drag to move, pinch to zoom." : "Drag to move, scroll to zoom, shift and drag to select."}`;
};

const PANELS = {
  search: ["Search", searchPanel], copies: ["Copies", copiesPanel], outliers: ["Outliers", outliersPanel],
  clusters: ["Clusters", clustersPanel], labels: ["Labels", labelsPanel],
};

app.count = (name, count) => (document.querySelector(`#tab-${name} .count`).textContent = count.toLocaleString("en"));

app.open = (name) => {
  for (const one of Object.keys(PANELS)) {
    document.getElementById(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    document.getElementById(`panel-${one}`).hidden = one !== name;
  }
};

function mapTools() {
  const tools = document.getElementById("map-tools");
  const maps = app.about.maps.map((name) => button(name, () => showMap(name)));
  async function showMap(name) {
    const answer = await fetched(`points?map=${encodeURIComponent(name)}`);
    if (!answer) return;
    app.map.setPoints(new Uint16Array(await answer.arrayBuffer()));
    maps.forEach((one) => one.setAttribute("aria-pressed", String(one.textContent === name)));
  }
  const box = button("Select a box", () => {
    app.map.boxing = !app.map.boxing;
    box.setAttribute("aria-pressed", String(app.map.boxing));
  });
  if (maps.length > 1) tools.append(...maps);
  tools.append(button("Closer", () => app.map.zoomBy(2)), button("Farther", () => app.map.zoomBy(0.5)), button("Whole map", () => app.map.whole()), box);
  return showMap(app.about.maps.at(-1));
}

async function start() {
  app.about = await app.ask("about");
  if (!app.about) return;
  const { title, model, count, unreadable, has_images } = app.about;
  document.title = `${title} – hf-vicreg explore`;
  document.getElementById("title").textContent = title;
  document.getElementById("about").textContent = `${plural(count, "image")} as ${model} sees them${unreadable ? `; ${unreadable.toLocaleString("en")} could not be read` : ""}${has_images ? "" : "; start with --data IMAGES to see them"}`;
  app.map = makeMap(app);
  const clusters = await fetched("clusters");
  if (clusters) app.clusters = new Uint16Array(await clusters.arrayBuffer());
  for (const [name, [title]] of Object.entries(PANELS)) {
    const tab = button(title, () => app.open(name)), panel = element("div", "panel-body");
    tab.id = `tab-${name}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", `panel-${name}`);
    tab.append(element("span", "count"));
    panel.id = `panel-${name}`;
    panel.setAttribute("role", "tabpanel");
    panel.hidden = name !== "search";
    document.getElementById("tabs").append(tab);
    document.getElementById("panels").append(panel);
  }
  app.open("search");
  await mapTools();
  document.body.dataset.usable = Math.round(performance.now()); // in ms: the map can be used
  await Promise.all(Object.entries(PANELS).map(([name, [, fill]]) => fill(app, document.getElementById(`panel-${name}`))));
  document.body.dataset.ready = Math.round(performance.now());
}

start();
