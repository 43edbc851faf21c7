// Keeps the whole site: the page by its version, the bundle's parts by their content.
// PAGE and PARTS are written here by `tiue-export web`; `lazy` files are kept when they are used.

const PAGE = { version: "", files: [], lazy: [] };
const PARTS = [];

// By place: other sites of this kind may lie on the same host.
const SCOPE = self.registration.scope;
const PARTS_CACHE = `${SCOPE} parts`;
const PAGE_CACHE = `${SCOPE} page ${PAGE.version}`;

/** The cache that a file belongs to; none for what is not of the site. */
function cacheOf(path) {
  if (PARTS.includes(path)) return PARTS_CACHE;
  return PAGE.lazy.includes(path) ? PAGE_CACHE : null;
}

// Threads need an isolated page, and not every host can send the headers for it.
const ISOLATING = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", (event) => {
  self.skipWaiting();
  // Without the browser's own cache, which may hold files of an older site.
  const fresh = PAGE.files.map((path) => new Request(path, { cache: "reload" }));
  event.waitUntil(caches.open(PAGE_CACHE).then((cache) => cache.addAll(fresh)));
});

self.addEventListener("activate", (event) => event.waitUntil(tidyAndClaim()));

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method === "GET" && url.origin === location.origin) {
    event.respondWith(answer(event, url).then(isolated));
  }
});

async function tidyAndClaim() {
  for (const name of await caches.keys()) {
    if (name.startsWith(`${SCOPE} page `) && name !== PAGE_CACHE) await caches.delete(name);
  }
  const cache = await caches.open(PARTS_CACHE);
  const wanted = new Set(PARTS.map((path) => new URL(path, SCOPE).href));
  for (const request of await cache.keys()) {
    if (!wanted.has(request.url)) await cache.delete(request);
  }
  await self.clients.claim();
}

async function answer(event, url) {
  const { request } = event;
  const bare = url.origin + url.pathname; // the page takes ?backend=wasm
  const kept = (await caches.match(bare)) ?? (await caches.match(request));
  if (kept) return kept;
  const path = bare.slice(SCOPE.length);
  const response = await fetch(request);
  const name = cacheOf(path);
  if (name !== null && response.status === 200) {
    const copy = response.clone();
    // A full disk must not stop a drawing.
    const kept = caches.open(name).then((cache) => cache.put(bare, copy));
    event.waitUntil(kept.catch(() => {}));
  }
  return response;
}

function isolated(response) {
  if (response.type === "opaqueredirect" || response.status === 0) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATING)) headers.set(name, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
