"use strict";
// The panels beside the map. What they show of others goes into the page as text alone.
function button(text, act, kind) {
  const made = element("button", kind, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// An image of the set, to pick and to choose; `words` stand below it.
function tile(app, row, words) {
  const made = element("figure", "tile"), pick = button("", () => app.pick(row), "pick");
  const box = element("input");
  box.type = "checkbox";
  box.title = "select";
  box.setAttribute("aria-label", `select image ${row}`);
  made.dataset.row = row;
  if (app.about.has_images) pick.append(app.imageOf(row));
  const word = element("span", "word");
  if (!app.about.has_images) pick.append(word);
  app.nameOf(row).then((name) => {
    pick.title = name;
    pick.setAttribute("aria-label", name);
    word.textContent = name;
  });
  box.addEventListener("change", () => app.select([row], box.checked));
  made.append(pick, box, element("figcaption", "", words));
  mark(app, made);
  return made;
}

function mark(app, made) {
  const chosen = app.selected.has(Number(made.dataset.row));
  made.classList.toggle("chosen", chosen);
  made.querySelector("input").checked = chosen;
}

function tilesOf(app, pairs) {
  const made = element("div", "tiles");
  made.append(...pairs.map(([row, words]) => tile(app, row, words)));
  return made;
}

const plural = (count, one, more) => `${count.toLocaleString("en")} ${count === 1 ? one : more || one + "s"}`;

function searchPanel(app, body) {
  const drop = element("div", "drop"), file = element("input"), found = element("div");
  file.type = "file";
  file.accept = "image/*";
  file.id = "file";
  file.hidden = true;
  async function look(image) {
    const pairs = await app.ask("near", { method: "POST", body: image });
    if (!pairs) return;
    const shown = element("img");
    shown.alt = "";
    shown.src = URL.createObjectURL(image);
    app.picked = -1;
    show(pairs, `Nearest to ${image.name || "the image"}`, shown);
  }
  file.addEventListener("change", () => file.files.length && look(file.files[0]).then(() => (file.value = "")));
  drop.append(button("Choose an image", () => file.click()), file, element("span", "", "or drop one here, or click one on the map"));
  for (const name of ["dragover", "dragleave", "drop"]) {
    addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) {
        app.open("search");
        look(event.dataTransfer.files[0]);
      }
    });
  }
  if (app.about.has_model) body.append(drop);
  else body.append(element("p", "none", "Click an image on the map. To look for an image of your own, name the model behind IMAGES."));
  if (app.about.takes_words) {
    const form = element("div", "row"), words = element("input");
    words.type = "search";
    words.id = "words";
    words.placeholder = "what the images shall show";
    words.setAttribute("aria-label", "words");
    const ask = async () => {
      const pairs = words.value.trim() && (await app.ask(`words?text=${encodeURIComponent(words.value)}`));
      if (!pairs) return;
      app.picked = -1;
      show(pairs, `Nearest to “${words.value}”`);
    };
    words.addEventListener("keydown", (event) => event.key === "Enter" && ask());
    form.append(words, button("Search", ask));
    body.append(form);
  }
  body.append(found);

  function show(pairs, title, shown, row) {
    const rows = pairs.map(([one]) => one), head = element("div", "picked"), beside = element("div"), word = element("p", "word", title);
    const tools = element("div", "row");
    if (row !== undefined) tools.append(button(app.selected.has(row) ? "Unselect" : "Select it", (event) => {
      app.select([row], !app.selected.has(row));
      event.target.textContent = app.selected.has(row) ? "Unselect" : "Select it";
    }));
    tools.append(button(`Select these ${rows.length}`, () => app.select(rows, true)));
    beside.append(word, tools);
    if (shown) head.append(shown);
    head.append(beside);
    if (!shown) head.style.gridTemplateColumns = "minmax(0, 1fr)";
    found.replaceChildren(head, tilesOf(app, pairs.map(([one, cosine]) => [one, cosine.toFixed(3)])));
    app.found = rows;
    app.map.draw();
  }

  app.pick = async (row) => {
    app.picked = row;
    app.open("search");
    app.map.draw();
    const [pairs, name] = await Promise.all([app.ask(`near/${row}`), app.nameOf(row)]);
    if (pairs && app.picked === row) show(pairs, name, app.about.has_images ? app.imageOf(row, 640) : undefined, row);
  };
}

function same({ rows, identical, cosine }) {
  if (identical === rows.length) return "identical files";
  return `cosine ${cosine.toFixed(4)}${identical ? `, ${identical} identical files` : ""}`;
}

function copiesPanel(app, body) {
  const slider = element("div", "slider"), range = element("input"), said = element("output"), told = element("p"), tools = element("div", "row"), list = element("div");
  Object.assign(range, { type: "range", min: 0, max: 75, step: 5, value: 50, id: "alike" });
  range.setAttribute("aria-label", "how near");
  const label = element("label", "", "how near");
  label.htmlFor = "alike";
  slider.append(label, range, said);
  body.append(element("p", "hint", "Images that lie much nearer to each other than images of this set usually do: at most this share of the median distance to the nearest."), slider, told, tools, list);
  let turn = 0;
  async function show() {
    said.textContent = `${range.value} %`;
    const own = ++turn, found = await app.ask(`copies?percent=${range.value}`);
    if (!found || own !== turn) return;
    app.count("copies", found.num_groups);
    told.textContent = `${plural(found.num_groups, "group")} of ${plural(found.num_images, "image")}; ${found.num_identical ? `${found.num_identical} of them with identical files.` : "no files are identical."}`;
    tools.replaceChildren(...(found.extra.length ? [button(`Select all but the first of each (${found.extra.length})`, () => app.select(found.extra, true))] : []));
    list.replaceChildren(
      ...found.groups.slice(0, 60).map((group) => {
        const made = element("div", "group"), head = element("h3");
        head.append(element("b", "", plural(group.rows.length, "image")), element("span", "hint", same(group)), button("Select all but the first", () => app.select(group.rows.slice(1), true)));
        made.append(head, tilesOf(app, group.rows.slice(0, 24).map((row) => [row, ""])));
        return made;
      }),
    );
    if (found.num_groups > 60) list.append(element("p", "hint", `The closest 60 of ${found.num_groups} groups.`));
  }
  range.addEventListener("input", () => (said.textContent = `${range.value} %`));
  range.addEventListener("change", show);
  return show();
}

async function outliersPanel(app, body) {
  const found = (await app.ask("outliers?count=60")) || [], rows = found.map(([row]) => row);
  const tools = element("div", "row");
  tools.append(button("Select the first 10", () => app.select(rows.slice(0, 10), true)), button("Show on the map", () => ((app.found = rows), app.map.draw())));
  body.append(element("p", "hint", "Images with unusual features, the strangest first; below each how strange it is: 1 is usual."), tools, tilesOf(app, found.map(([row, far]) => [row, far.toFixed(2)])));
}

function clustersPanel(app, body) {
  app.count("clusters", app.about.clusters.length);
  body.append(element("p", "hint", "Groups by k-means, the largest first, each by the images nearest to its middle."));
  app.about.clusters.forEach(({ count, central }, number) => {
    const made = element("div", "group"), head = element("h3"), key = element("span", "dot"), lit = button("On the map", () => {
      app.lit = app.lit === number ? null : number;
      app.colouring("clusters");
      for (const one of body.querySelectorAll(".lit")) one.setAttribute("aria-pressed", String(Number(one.dataset.cluster) === app.lit));
    }, "lit");
    lit.dataset.cluster = number;
    const paint = () => (key.style.background = tone(number));
    paint();
    dark.addEventListener("change", paint);
    head.append(key, element("b", "", plural(count, "image")), lit, button("Select", () => app.select(app.rowsOf(number), true)));
    made.append(head, tilesOf(app, central.map((row) => [row, ""])));
    body.append(made);
  });
}

function labelsPanel(app, body) {
  const form = element("div", "row"), name = element("input"), list = element("ul", "tally"), slider = element("div", "slider"), least = element("input"), said = element("output");
  const told = element("p"), tools = element("div", "row"), given = new Map(kept());
  Object.assign(name, { type: "text", id: "label", placeholder: "name of a class", maxLength: 100 });
  name.setAttribute("aria-label", "name of a class");
  const names = element("datalist");
  names.id = "labels-given";
  name.setAttribute("list", names.id);
  Object.assign(least, { type: "range", min: 0, max: 100, step: 5, value: 80, id: "least" });
  const label = element("label", "", "at least so sure");
  label.htmlFor = "least";
  slider.append(label, least, said);
  const give = () => {
    const word = name.value.trim(), rows = app.selected.size ? [...app.selected] : app.picked >= 0 ? [app.picked] : [];
    if (!word || !rows.length) return app.tell(word ? "Select images first, on the map or in a list." : "Give the class a name first.");
    for (const row of rows) given.set(row, word);
    app.select([...app.selected], false);
    spread();
  };
  name.addEventListener("keydown", (event) => event.key === "Enter" && give());
  form.append(name, names, button("Label the selected", give));
  body.append(element("p", "hint", "Select a few images of a class and name it; the labels spread along the nearest neighbours to the rest."), form, list, slider, told, tools);
  const sent = () => ({ method: "POST", body: JSON.stringify({ given: [...given], least: least.value / 100 }) });

  // labels given by hand stay in the browser: a page may be closed, or left, before they are saved
  function kept() {
    try {
      const found = JSON.parse(localStorage.getItem(`labels ${app.about.key}`));
      return Array.isArray(found) ? found.filter(Array.isArray) : [];
    } catch {
      return []; // not one that was written here, or a browser that keeps nothing
    }
  }

  function keep() {
    try {
      localStorage.setItem(`labels ${app.about.key}`, JSON.stringify([...given]));
    } catch {
      // then they are gone with the page
    }
  }

  async function spread() {
    keep();
    const found = await app.ask("spread", sent());
    if (!found) return;
    app.labels = found;
    show();
    app.colouring(found.names.length ? "labels" : "clusters");
  }

  function show() {
    const found = app.labels, bar = Number(least.value);
    said.textContent = `${bar} %`;
    app.least = bar;
    const counts = found.names.map(() => 0), own = found.names.map(() => 0);
    found.classes.forEach((one, row) => one >= 0 && (found.sure[row] >= bar || given.has(row)) && counts[one]++);
    for (const [, one] of found.given) own[one]++;
    names.replaceChildren(...found.names.map((one) => Object.assign(element("option"), { value: one })));
    list.replaceChildren(
      ...found.names.map((one, place) => {
        const made = element("li"), key = element("span", "dot");
        key.style.background = tone(place);
        made.append(key, element("span", "name", one), element("span", "much", `${own[place]} by hand, ${counts[place].toLocaleString("en")} in all`), button("Select", () => app.select([...found.classes.keys()].filter((row) => found.classes[row] === place && (found.sure[row] >= bar || given.has(row))), true)), button("Remove", () => {
          for (const [row, number] of found.given) if (number === place) given.delete(row);
          spread();
        }));
        return made;
      }),
    );
    const all = counts.reduce((sum, one) => sum + one, 0);
    app.count("labels", found.names.length);
    const alone = found.names.length === 1 ? " As long as there is one class, all are of it: name another one." : "";
    told.textContent = found.names.length ? `${all.toLocaleString("en")} of ${plural(app.about.count, "image")} have a label.${alone}` : "";
    tools.replaceChildren(...(found.names.length ? [button("Save labels.csv", () => app.save("labels.csv", sent()))] : []));
    slider.hidden = !found.names.length;
    if (found.names.length) tools.append(element("p", "hint", "hf-vicreg finetune classification MODEL --dataset_name IMAGES --labels_file labels.csv reads it."));
    app.map.draw();
  }
  least.addEventListener("input", show);
  slider.hidden = true;
  return given.size ? spread() : undefined;
}
