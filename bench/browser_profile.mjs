// Runs one of the bench's pages under V8's sampling profiler and prints the share of time of each function, as JSON.
// node browser_profile.mjs {playwright, executable, url, load, time}
const { playwright, executable, url, load, time } = JSON.parse(process.argv[2]);
const { chromium } = await import(playwright);
const context = await chromium.launch({ executablePath: executable, headless: true, chromiumSandbox: process.getuid() !== 0, args: ["--disable-gpu"] });
try {
  const page = await context.newPage();
  const session = await page.context().newCDPSession(page);
  const workers = [], waiting = new Map();
  let calls = 0;
  session.on("Target.attachedToTarget", ({ sessionId }) => workers.push(sessionId));
  session.on("Target.receivedMessageFromTarget", ({ message }) => {
    const { id, result } = JSON.parse(message);
    waiting.get(id)?.(result);
  });
  const ask = (sessionId, method, params = {}) => new Promise((resolve) => {
    waiting.set(++calls, resolve);
    session.send("Target.sendMessageToTarget", { sessionId, message: JSON.stringify({ id: calls, method, params }) });
  });
  await session.send("Target.setAutoAttach", { autoAttach: true, waitForDebuggerOnStart: false, flatten: false });
  await page.exposeFunction("tell", () => {});
  await page.goto(url);
  await page.waitForFunction(() => window.model !== undefined);
  await page.evaluate((args) => window.model.load(args), load);
  await page.evaluate((args) => window.model.time(args), time); // so that all code is compiled well
  const found = {};
  for (const [what, n] of [["prefill and decode", time.n], ["prefill", 0]]) {
    for (const worker of workers) {
      await ask(worker, "Profiler.enable");
      await ask(worker, "Profiler.setSamplingInterval", { interval: 500 });
      await ask(worker, "Profiler.start");
    }
    await page.evaluate((args) => window.model.time(args), { ...time, n });
    const spent = new Map();
    let all = 0;
    for (const worker of workers) {
      const { profile } = await ask(worker, "Profiler.stop");
      const names = new Map(profile.nodes.map((node) => [node.id, node.callFrame.functionName || "(anonymous)"]));
      profile.samples.forEach((id, i) => {
        const name = names.get(id);
        if (["(idle)", "(root)"].includes(name)) return;
        spent.set(name, (spent.get(name) ?? 0) + profile.timeDeltas[i]);
        all += profile.timeDeltas[i];
      });
    }
    found[what] = [...spent].sort((a, b) => b[1] - a[1]).slice(0, 12).map(([name, us]) => [name, us / all]);
  }
  console.log(JSON.stringify(found));
} finally {
  await context.close();
}
