// The page of a Space. Text goes into it as text alone; a visitor's picture goes to the server, is looked at, and stays here.
(() => {
  const MOST_NEAR = 8, MOST_OWN = 40;
  const at = (id) => document.getElementById(id);
  const pictures = []; // { source, name, blob, feature, look, button }
  let chosen = null, kind = "own";

  function numbers(text) {
    return new Float32Array(Uint8Array.from(atob(text), (one) => one.charCodeAt(0)).buffer);
  }

  async function asked(address, options) {
    const answer = await fetch(address, options);
    if (answer.ok) return answer.json();
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error || "the server answered " + answer.status);
  }

  function trouble(text) {
    at("trouble").hidden = !text;
    at("trouble").textContent = text;
  }

  function add(picture) {
    const button = element("button", picture.blob ? "own" : ""), image = element("img");
    button.type = "button";
    button.title = image.alt = picture.name;
    image.src = picture.source;
    image.loading = "lazy";
    button.append(image);
    button.addEventListener("click", () => choose(picture));
    picture.button = button;
    pictures.push(picture);
    at("gallery").append(button);
  }

  async function choose(picture) {
    chosen = picture;
    trouble("");
    document.body.setAttribute("aria-busy", "true");
    try {
      picture.look ??= await (picture.blob
        ? asked("look", { method: "POST", body: picture.blob })
        : asked("look/" + picture.number));
      picture.feature ??= numbers(picture.look.feature);
    } catch (error) {
      trouble(picture.name + ": " + error.message);
      if (picture.blob) remove(picture);
      return;
    } finally {
      document.body.setAttribute("aria-busy", "false");
    }
    if (chosen === picture) show();
  }

  function remove(picture) {
    if (!pictures.includes(picture)) return; // by an earlier click
    picture.button.remove();
    pictures.splice(pictures.indexOf(picture), 1);
    URL.revokeObjectURL(picture.source);
  }

  function show() {
    const { look } = chosen;
    for (const one of pictures) one.button.setAttribute("aria-pressed", String(one === chosen));
    at("shown").src = at("under").src = look.image;
    at("shown").alt = at("under").alt = chosen.name;
    at("size").textContent = "as the model is given it: " + look.size;
    at("grid").textContent = look.grid.join("x") + " patches";
    colours();
    near();
    const place = element("div", "attention");
    at("looks").replaceChildren(look.attention.none ? element("p", "none", look.attention.none) : place);
    if (!look.attention.none) showAttention(place, look.attention);
    document.body.dataset.chosen = chosen.name;
  }

  function colours() {
    at("over").src = chosen.look.colours[kind];
    at("over").alt = "its patches as colours";
    for (const one of ["own", "all"]) at(one).setAttribute("aria-pressed", String(one === kind));
  }

  function near() {
    const cosine = (one) => one.feature.reduce((sum, value, place) => sum + value * chosen.feature[place], 0);
    const others = pictures.filter((one) => one !== chosen && one.feature).map((one) => [cosine(one), one]);
    others.sort(([one], [other]) => other - one);
    at("near").replaceChildren(
      ...others.slice(0, MOST_NEAR).map(([value, one]) => {
        const figure = element("figure"), button = element("button"), image = element("img");
        button.type = "button";
        button.title = image.alt = one.name;
        image.src = one.source;
        button.append(image);
        button.addEventListener("click", () => choose(one));
        figure.append(button, element("figcaption", "", value.toFixed(3)));
        return figure;
      }),
    );
  }

  async function take(files) {
    for (const file of files) {
      if (pictures.filter((one) => one.blob).length >= MOST_OWN) return trouble("At most " + MOST_OWN + " of your own.");
      add({ source: URL.createObjectURL(file), name: file.name, blob: file });
      await choose(pictures[pictures.length - 1]);
    }
  }

  async function begin() {
    const about = await asked("about"), features = numbers(about.features);
    document.title = about.model;
    const link = element("a", "", about.model);
    link.href = about.link;
    link.rel = "noopener";
    link.target = "_blank";
    at("title").append(link);
    at("about").textContent = "Its features, the nearest neighbours they give, and its attention" + (about.revision ? ", at commit " + about.revision.slice(0, 8) : "") + ".";
    at("origin").textContent = about.pictures;
    for (let number = 0; number < about.count; number++) {
      const feature = features.subarray(number * about.width, (number + 1) * about.width);
      add({ source: "picture/" + number, name: "picture " + (number + 1), number, feature });
    }
    await choose(pictures[0]);
    document.body.dataset.ready = "true";
  }

  for (const one of ["own", "all"]) at(one).addEventListener("click", () => ((kind = one), chosen && colours()));
  at("opacity").addEventListener("input", () => at("features").style.setProperty("--over", at("opacity").value / 100));
  at("file").addEventListener("change", () => take([...at("file").files]).then(() => (at("file").value = "")));
  at("pictures").addEventListener("dragover", (event) => {
    event.preventDefault();
    at("pictures").classList.add("over");
  });
  at("pictures").addEventListener("dragleave", () => at("pictures").classList.remove("over"));
  at("pictures").addEventListener("drop", (event) => {
    event.preventDefault();
    at("pictures").classList.remove("over");
    take([...event.dataTransfer.files]);
  });
  begin().catch((error) => trouble(error.message));
})();
