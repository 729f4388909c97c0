// Opens chat.html of a folder in Chromium, sends a message and prints what came back, as JSON.
// node browser.mjs PLAYWRIGHT CHROMIUM PARENT FOLDER MESSAGE
import { createReadStream, existsSync, mkdtempSync, rmSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";

const [, , playwright, executablePath, parent, folder, message] = process.argv;
const { chromium } = await import(playwright);
const types = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const server = createServer((request, reply) => {
  const path = join(parent, decodeURIComponent(request.url.split("?")[0]));
  if (!existsSync(path) || statSync(path).isDirectory()) return reply.writeHead(404).end();
  reply.writeHead(200, {
    "Content-Type": types[extname(path)] ?? "application/octet-stream",
    "Content-Length": statSync(path).size,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  createReadStream(path).pipe(reply);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args });
const asked = [], errors = [];
try {
  const page = await context.newPage();
  page.on("request", (request) => asked.push(request.url()));
  page.on("pageerror", (error) => errors.push(String(error)));
  const origin = `http://127.0.0.1:${server.address().port}`;
  await page.goto(`${origin}/${folder}/chat.html`);
  await page.waitForFunction(() => !document.getElementById("state").textContent.startsWith("Loading"), null, { timeout: 600000 });
  const ready = await page.textContent("#state");
  const began = performance.now();
  let answer = "", state = "";
  if (ready.startsWith("Ready")) {
    await page.fill("#text", message);
    await page.click("#send");
    await page.waitForFunction(() => !document.getElementById("send").disabled, null, { timeout: 600000 });
    answer = await page.textContent("#log li.assistant");
    state = await page.textContent("#state");
  }
  const isolated = await page.evaluate(() => self.crossOriginIsolated);
  const outside = asked.filter((url) => !url.startsWith(origin) && !url.startsWith("blob:") && !url.startsWith("data:"));
  console.log(JSON.stringify({ ready, answer, state, isolated, outside, errors, ms: performance.now() - began }));
} finally {
  await context.close();
  server.close();
  rmSync(profile, { recursive: true, force: true });
}
