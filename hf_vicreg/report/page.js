"use strict";
// What the other scripts share. Text goes into the page as text alone: `textContent`, never markup.
const content = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A number as people read it: three or four digits.
function figure(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(1);
  return String(+value.toPrecision(size >= 100 ? 4 : 3));
}

// A canvas `width` wide on the screen, its drawing scaled to the screen's own pixels.
function prepare(canvas, width, height) {
  const scale = Math.min(3, devicePixelRatio || 1);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.imageSmoothingEnabled = false;
  return context;
}

function whenResized(node, draw) {
  let width = 0;
  new ResizeObserver((entries) => {
    const now = Math.round(entries[0].contentRect.width);
    if (now && now !== width) {
      width = now;
      requestAnimationFrame(draw);
    }
  }).observe(node);
  dark.addEventListener("change", draw);
}

for (const slider of document.querySelectorAll(".opacity")) {
  slider.addEventListener("input", () => {
    slider.closest(".patches").style.setProperty("--over", slider.value / 100);
  });
}
