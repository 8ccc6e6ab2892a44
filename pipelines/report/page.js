"use strict";
// The page is complete without this: it only makes the overlay's strength and the face boxes adjustable.
const root = document.documentElement;
const strength = document.getElementById("strength");
const boxes = document.getElementById("boxes");
let before = strength.value;

function show() {
  root.style.setProperty("--overlay", strength.value / 100);
  root.classList.toggle("bare", !boxes.checked);
  document.getElementById("strength-value").value = strength.value + " %";
}

function toggleOverlay() {
  if (strength.value !== "0") before = strength.value;
  strength.value = strength.value === "0" ? before : "0";
}

document.getElementById("controls").hidden = false;
strength.addEventListener("input", show);
boxes.addEventListener("change", show);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "o") toggleOverlay();
  else if (event.key === "b") boxes.checked = !boxes.checked;
  else return;
  show();
});
show();
