// Two pictures one over the other: dragging over them, or moving the slider below, moves the cut between them.
"use strict";
for (const pair of document.querySelectorAll(".pair")) {
  const stack = pair.querySelector(".stack"), range = pair.querySelector("input");
  const cut = (percent) => {
    range.value = percent;
    stack.style.setProperty("--cut", `${range.value}%`);
  };
  const follow = (event) => {
    const box = stack.getBoundingClientRect();
    cut((100 * (event.clientX - box.left)) / box.width);
  };
  stack.addEventListener("pointerdown", (event) => {
    stack.setPointerCapture(event.pointerId);
    follow(event);
  });
  stack.addEventListener("pointermove", (event) => {
    if (event.buttons) follow(event);
  });
  stack.addEventListener("dragstart", (event) => event.preventDefault());
  range.addEventListener("input", () => cut(range.value));
  range.hidden = false;
  pair.classList.add("live");
  cut(50);
}
