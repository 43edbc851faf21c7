// In words that every browser reads: why nothing else of this page runs, where nothing does.

function cannot(why) {
  document.getElementById("status").textContent = why;
}

if (!("noModule" in document.createElement("script"))) {
  cannot("This browser is too old to draw: it knows no JavaScript modules. A current one does.");
}

window.addEventListener(
  "error",
  function () {
    if (window.pageRuns) return;
    cannot(
      "This page cannot start: the browser is too old, or the site was not copied whole. " +
        "Reload it, or take a current browser.",
    );
  },
  true,
);
