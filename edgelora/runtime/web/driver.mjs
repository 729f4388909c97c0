// Opens a page in Chromium and calls its functions. argv: {playwright, executable, profile, url, sandbox} as JSON.
// In, a line each: {call, args}. Out, a line each: {result}, {error, crashed}, or {event} while a call runs.
import { createInterface } from "node:readline";

const { playwright, executable, profile, url, sandbox } = JSON.parse(process.argv[2]);
const { chromium } = await import(playwright);
const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const context = await chromium.launchPersistentContext(profile, {
  executablePath: executable,
  headless: true,
  chromiumSandbox: sandbox,
  args: ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await context.newPage();
let end;
const ended = new Promise((_, reject) => { end = (words) => reject(Object.assign(new Error(words), { crashed: true })); });
ended.catch(() => {});
page.on("crash", () => end("the page crashed: it may have run out of memory"));
context.on("close", () => end("the browser closed"));
try {
  await page.exposeFunction("tell", (event) => say({ event }));
  await page.goto(url);
  await page.waitForFunction(() => window.model !== undefined, null, { timeout: 60000 });
  say({ result: { browser: `Chromium ${context.browser()?.version() ?? ""}`.trim() } });
  const lines = createInterface({ input: process.stdin });
  lines.on("close", () => end("nobody listens any more")); // whoever drives us was killed: a call that runs is given up
  for await (const line of lines) {
    const request = JSON.parse(line);
    try {
      say({ result: await Promise.race([page.evaluate(({ call, args }) => window.model[call](args), request), ended]) });
    } catch (error) {
      say({ error: String(error.message ?? error).split("\n")[0], crashed: Boolean(error.crashed) });
    }
  }
} catch (error) {
  say({ error: String(error.message ?? error).split("\n")[0], crashed: true });
} finally {
  await context.close().catch(() => {});
}
