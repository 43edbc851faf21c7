// Keys of the studio. They act outside text fields only, except Alt with a digit.
(() => {
  const click = (id) => document.querySelector(`#${id}`)?.click();
  const actions = { r: "tiue-random", "[": "tiue-previous", "]": "tiue-next" };
  document.addEventListener("keydown", (event) => {
    if (event.altKey && !event.ctrlKey && "123".includes(event.key)) {
      const tabs = document.querySelectorAll('#tiue-tabs [role="tab"]');
      tabs[Number(event.key) - 1]?.click();
      event.preventDefault();
      return;
    }
    const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      document.querySelector("#tiue-prompt textarea, #tiue-prompt input")?.focus();
      event.preventDefault();
    } else if (actions[event.key]) {
      click(actions[event.key]);
      event.preventDefault();
    }
  });
})();
