// What scrolls sideways can be reached and scrolled by keyboard.
function reachable() {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container, .cell_output table, div.output, mjx-container[display]")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else if (box.matches("[tabindex]:not(pre, mjx-container)")) box.removeAttribute("tabindex");
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
