// The service worker's side of the page: it keeps the site for use without a network, and isolates
// the page, which threads need, on hosts that cannot send the headers for it.

const ISOLATED_ONCE = "tiue-reloaded-for-threads";

/** Wait until the worker answers for this page, and reload once where that brings threads.
 *  Whether the page is kept for use without a network. */
export async function takeOffline() {
  if (!("serviceWorker" in navigator)) return false;
  try {
    await navigator.serviceWorker.register("sw.js");
    await Promise.race([controlled(), new Promise((resolve) => setTimeout(resolve, 5000))]);
  } catch (error) {
    console.warn("The page is not kept for use without a network:", error.message);
    return false;
  }
  if (!crossOriginIsolated && navigator.serviceWorker.controller && !reloaded()) {
    sessionStorage.setItem(ISOLATED_ONCE, "yes");
    location.reload();
    await new Promise(() => {}); // until the page is gone
  }
  return navigator.serviceWorker.controller !== null;
}

/** Hear of a new version of the site, which has taken this page over. */
export function onNewVersion(heard) {
  const { serviceWorker } = navigator;
  // A first visit is taken over too: by its own version.
  if (!serviceWorker?.controller) return;
  serviceWorker.addEventListener("controllerchange", heard, { once: true });
}

function controlled() {
  if (navigator.serviceWorker.controller) return Promise.resolve();
  return new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
  });
}

function reloaded() {
  return sessionStorage.getItem(ISOLATED_ONCE) !== null;
}
