// Draws the charts of a page out of the data in it. vegaEmbed comes from vl-convert's wheel.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const ink = dark ? "#d6d6d6" : "#333333", grid = dark ? "#3a3a3a" : "#e2e2e2";
  const words = { labelColor: ink, titleColor: ink };
  const config = {
    background: "transparent",
    axis: { ...words, gridColor: grid, domainColor: ink, tickColor: ink, labelFontSize: 11, titleFontSize: 11 },
    legend: words,
    view: { stroke: grid },
    font: "system-ui, sans-serif",
  };
  const nothing = { load: () => Promise.reject(new Error("a report loads nothing")), sanitize: () => Promise.reject(new Error("no links")) };
  const options = { actions: false, renderer: "svg", ast: true, config, loader: nothing, tooltip: { theme: dark ? "dark" : "light" } };
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const draw = (element) => {
    if (element.dataset.drawn) return;
    element.dataset.drawn = "yes";
    vegaEmbed(element, specs[element.id], options).catch((error) => {
      element.textContent = "This chart could not be drawn: " + error.message;
      element.dataset.drawn = "failed";
    });
  };
  // A chart is drawn once it is to be seen: hidden ones have no width yet.
  const seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)), { rootMargin: "400px" });
  document.querySelectorAll(".chart").forEach((element) => seen.observe(element));
  addEventListener("beforeprint", () => document.querySelectorAll(".chart").forEach(draw));
})();
