// What scrolls sideways can be reached and scrolled by keyboard; a formula that does not is no stop on the way.
function reachable() {
  for (const image of document.querySelectorAll("img.figure")) image.classList.toggle("wide", image.naturalWidth > 600);
  for (const box of document.querySelectorAll(".pst-scrollable-table-container, div.output, mjx-container")) {
    if (box.scrollWidth > box.clientWidth + 1 && !box.matches("mjx-container:not([display])")) box.tabIndex = 0;
    else if (box.matches("mjx-container")) box.tabIndex = -1;
    else if (box.matches("[tabindex]")) box.removeAttribute("tabindex");
  }
}
addEventListener("load", function () {
  for (const fold of document.querySelectorAll(".bd-sidebar-primary summary")) fold.setAttribute("aria-label", "Pages below this one");
  reachable();
  if (window.MathJax && MathJax.startup && MathJax.startup.promise) MathJax.startup.promise.then(reachable);
});
addEventListener("resize", reachable);
