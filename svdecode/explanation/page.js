"use strict";
(() => {
  const steps = JSON.parse(document.getElementById("steps").textContent);
  const root = document.documentElement;
  const panel = document.getElementById("panel");
  const profile = document.getElementById("profile");
  const said = document.getElementById("said");
  const inputs = [...document.querySelectorAll("input[name=step]")];
  const NAMES = ["Pre-trained", "Warm start", "Steered"];
  const SVG = "http://www.w3.org/2000/svg";
  let shown = -1;

  // Texts of the model go into the page as text nodes alone.
  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function text(value) {
    return element("bdi", { class: "piece" }, value);
  }

  function bar(share, before, name) {
    const track = element("span", { class: `track ${name}`, "aria-hidden": "true" });
    const fill = element("span", { class: "fill" });
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    if (before !== null) {
      const tick = element("span", { class: "tick" });
      tick.style.left = `${100 * before}%`;
      track.append(tick);
    }
    return track;
  }

  function row(candidate) {
    const head = element("th", { scope: "row" }, text(candidate.token));
    for (const choice of candidate.choices) {
      head.append(element("span", { class: `choice ${choice.replace(" ", "-")}` }, `${choice}${choice === "steered" ? " choice" : "'s choice"}`));
    }
    const made = element("tr", candidate.kept ? {} : { class: "outside" }, head);
    made.append(element("td", { class: "kept" }, candidate.kept ? "in K" : "out"));
    candidate.shares.forEach((share, index) => {
      const before = index === 2 ? candidate.shares[1] : null;
      const name = NAMES[index].toLowerCase().replace(" ", "-");
      made.append(element("td", { class: "number" }, element("span", { class: "value" }, candidate.texts[index]), bar(share, before, name)));
    });
    return made;
  }

  function table(step) {
    const heads = ["Candidate", "K", ...NAMES].map((name) => element("th", { scope: "col" }, name));
    const caption = element("caption", {}, `Probability of each candidate; a full bar is ${step.full}. The line in the steered bars is the warm start.`);
    const body = element("tbody", {}, ...step.rows.map(row));
    return element("table", { class: "candidates" }, caption, element("thead", {}, element("tr", {}, ...heads)), body);
  }

  function go(label, spoken, target) {
    const made = element("button", { type: "button", "aria-label": spoken }, label);
    if (target < 0 || target >= steps.length) made.disabled = true;
    made.addEventListener("click", () => {
      choose(target);
      // The button was made anew with the panel: the keyboard stays where it was.
      const again = [...panel.querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === spoken);
      (again.disabled ? panel.querySelector("button:not(:disabled)") : again)?.focus();
    });
    return made;
  }

  function buttons(index) {
    const changed = steps.map((step, place) => (step.changed ? place : -1)).filter((place) => place >= 0);
    const made = element("div", { class: "buttons", role: "group", "aria-label": "Go to another step" });
    made.append(go("\u2190 Step", "Previous step", index - 1), go("Step \u2192", "Next step", index + 1));
    if (changed.length) {
      const before = changed.filter((place) => place < index).pop() ?? -1;
      const after = changed.find((place) => place > index) ?? -1;
      made.append(go("\u2190 \u25c6", "Previous changed step", before), go("\u25c6 \u2192", "Next changed step", after));
    }
    return made;
  }

  function show(index) {
    const step = steps[index];
    shown = index;
    const title = element("h2", { id: "panel-title" }, `Step ${step.step} of ${steps.length}: `, text(step.token));
    const verdict = element("p", { class: "verdict" });
    if (step.changed) verdict.append(element("span", { class: "mark", "aria-hidden": "true" }, "\u25c6 "), "Steering changed the choice from ", text(step.without), " to ", text(step.token), ".");
    else verdict.append("The warm start would have taken the same token.");
    const facts = element("dl", { class: "facts" });
    for (const [name, value] of step.facts) facts.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    panel.replaceChildren(element("div", { class: "panel-head" }, title, buttons(index)), verdict, facts, table(step));
    profile.querySelectorAll("rect.spot").forEach((spot, place) => spot.classList.toggle("on", place === index));
  }

  function choose(index) {
    inputs[index].checked = true;
    show(index);
    const step = steps[index];
    const change = step.changed ? `Steering changed the choice from ${step.without}.` : "The choice is the warm start's.";
    said.textContent = `Step ${step.step}, ${step.token}. ${change} ${step.facts[0][1]}. KL ${step.kl[1]} nats.`;
  }

  function piece(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // One bar for each step: the heights say without colour what the colours say.
  function draw(by) {
    const moved = by === "moved";
    const values = steps.map((step) => (moved ? step.moved[0] : step.kl[0]));
    const known = values.filter((value) => moved || value >= 0); // an infinite KL is -1, and as long as the longest
    const top = Math.max(...known.map(Math.abs), 1e-9);
    const longest = moved ? 40 : 80;
    const zero = moved ? 50 : 90;
    const svg = piece("svg", { viewBox: `0 0 ${steps.length} 100`, preserveAspectRatio: "none" });
    steps.forEach((step, index) => {
      const value = !moved && values[index] < 0 ? top : values[index];
      const height = (Math.abs(value) / top) * longest;
      const spot = piece("rect", { class: "spot", x: index, y: 0, width: 1, height: 100 });
      if (index === shown) spot.classList.add("on");
      spot.addEventListener("click", () => choose(index));
      const y = value < 0 ? zero : zero - height;
      const shape = { class: `bar ${value < 0 ? "down" : "up"}`, x: index + 0.15, y, width: 0.7, height: Math.max(height, 0.8) };
      svg.append(spot, piece("rect", shape));
    });
    svg.append(piece("line", { x1: 0, x2: steps.length, y1: zero, y2: zero }));
    const marks = element("div", { class: "marks" });
    steps.forEach((step, index) => {
      if (!step.changed) return;
      const mark = element("span", { class: "mark" }, "\u25c6");
      mark.style.left = `${(100 * (index + 0.5)) / steps.length}%`;
      marks.append(mark);
    });
    const largest = steps.find((step, index) => Math.abs(values[index]) === top);
    const scale = largest ? `Each bar is a step; the longest is ${moved ? largest.moved[1] : `${largest.kl[1]} nats`} (step ${largest.step}).` : "Each bar is a step.";
    profile.replaceChildren(marks, svg, element("p", { class: "note" }, scale));
  }

  inputs.forEach((input, index) => input.addEventListener("change", () => choose(index)));
  document.querySelectorAll("input[name=by]").forEach((input) =>
    input.addEventListener("change", () => {
      root.dataset.by = input.value;
      draw(input.value);
    }),
  );
  // A browser may remember what was checked before a page was loaded again.
  const by = document.querySelector("input[name=by]:checked");
  root.dataset.by = by.value;
  show(Math.max(inputs.findIndex((input) => input.checked), 0));
  draw(by.value);
})();
