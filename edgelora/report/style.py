"""The report page's style sheet: light and dark, 390 px and up, and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b1f26; --soft: #566070; --line: #dfe3e9; --track: #eceff3; --shade: #0000001a;
  --good: #14733b; --good-tint: #e4f4ea; --bad: #b3261e; --bad-tint: #fce8e6; --ref: #8b94a3;
  --s0: #1f6feb; --s1: #d5610d; --s2: #1a8754; --s3: #8a4fd0; --s4: #c02f63; --s5: #0e7f94;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12151a; --card: #1a1e25; --ink: #e8ebf0; --soft: #9fa9b8; --line: #303742; --track: #272d36; --shade: #000a;
    --good: #63d492; --good-tint: #16301f; --bad: #ff8a80; --bad-tint: #3a1b1a; --ref: #7d8796;
    --s0: #6cabff; --s1: #ff9a4d; --s2: #56cf92; --s3: #c09af2; --s4: #ff86ab; --s5: #52c7dc;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Hiragino Sans",
    "Noto Sans CJK JP", "Noto Sans JP", "Yu Gothic", Meiryo, system-ui, sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 40px 32px 64px; }
h1 { margin: 0; font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 16px; font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; }
h3 { margin: 0 0 8px; font-size: 15px; line-height: 1.4; }
p { margin: 0 0 12px; max-width: 76ch; }
section { margin-top: 44px; }
code, pre, .mono {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "Noto Sans Mono CJK JP", monospace;
  font-size: 0.875em;
}
pre {
  margin: 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; line-height: 1.5;
}
.lead { margin: 10px 0 6px; font-size: 20px; line-height: 1.45; max-width: 60ch; }
.about, .caption, .n { color: var(--soft); }
.about { margin: 0; font-size: 14px; overflow-wrap: anywhere; }
.caption { font-size: 14px; margin: 0 0 14px; max-width: 88ch; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.unsure { font-weight: 600; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 12px; margin-top: 28px; }
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px 13px; min-width: 0;
  overflow-wrap: anywhere;
}
.tile .name { font-size: 14px; line-height: 1.35; }
.tile .value {
  font-size: 27px; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  margin: 0 0 2px;
}
.tile .n { font-size: 13px; line-height: 1.4; }
.tile:only-child { max-width: 280px; }
.tile.pass { border-color: var(--good); background: var(--good-tint); }
.tile.fail { border-color: var(--bad); background: var(--bad-tint); }

.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; align-items: stretch; }
.beside { display: grid; grid-template-columns: minmax(0, 360px) minmax(0, 1fr); gap: 16px; align-items: start; }
figure { margin: 0; padding: 16px 18px 18px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0; }
figcaption { margin-bottom: 10px; font-size: 15px; font-weight: 600; line-height: 1.4; }
figcaption .legend {
  display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 2px; font-size: 13px; font-weight: 400; color: var(--soft);
}
.key { display: inline-flex; align-items: center; gap: 6px; min-width: 0; }
.key i { flex: none; width: 14px; height: 4px; border-radius: 2px; background: currentColor; }
.key i.dashed { height: 0; border-top: 2px dashed var(--ink); background: none; border-radius: 0; }
.key i.frontier { height: 0; border-top: 1.5px solid var(--soft); background: none; border-radius: 0; }
.key i.out { width: auto; height: auto; background: none; font-style: normal; line-height: 1; }
.key i.tick { width: 2px; height: 10px; background: var(--ink); border-radius: 0; opacity: 0.55; }
figure svg { display: block; width: 100%; max-width: 460px; height: auto; overflow: visible; }

.scroll { width: fit-content; min-width: min(100%, 560px); max-width: 100%; overflow-x: auto;
  border: 1px solid var(--line); border-radius: 10px;
  /* a shade at each edge beyond which there is more to scroll to */
  background:
    linear-gradient(to right, var(--card) 40%, transparent) 0 0 / 48px 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) 100% 0 / 48px 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) 0 0 / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) 100% 0 / 14px 100% no-repeat scroll,
    var(--card); }
.figures + .scroll, .scroll + .scroll, .beside + .scroll, .scroll + .beside, .scroll + .figures { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: normal; vertical-align: bottom; min-width: 4em; }
.beside > .scroll { min-width: 0; }
.beside :is(th, td) { padding-inline: 9px; }
td.long { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; border-radius: 2px; }
th button::after { content: "\\2195"; margin-inline-start: 4px; opacity: 0.45; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }
.right { text-align: right; }
.below { display: block; color: var(--soft); font-size: 12.5px; }
.pairs th { width: 16em; font-weight: 500; color: var(--soft); padding-right: 24px; }
.pairs td { white-space: normal; overflow-wrap: anywhere; }
.pairs { max-width: 100%; }
.two > .scroll { margin-top: 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; align-items: start; }
ul.notes { margin: 14px 0 0; padding-left: 20px; color: var(--soft); font-size: 14px; max-width: 88ch; }

.answer {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin-bottom: 14px; overflow: hidden;
  break-inside: avoid;
}
.scroll + .answer { margin-top: 16px; }
.answer > h3 { margin: 0; padding: 13px 18px; border-bottom: 1px solid var(--line); font-size: 16px; }
.answer > h3 .n { font-weight: 400; margin-inline-end: 8px; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 1px; background: var(--line); }
.said > div { background: var(--card); padding: 12px 18px 16px; min-width: 0; }
.said .who {
  font-size: 13px; color: var(--soft); margin-bottom: 4px; overflow-wrap: anywhere; display: flex; gap: 7px;
  align-items: baseline;
}
.said .who i { flex: none; width: 9px; height: 9px; border-radius: 50%; background: currentColor; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; }
details summary { cursor: pointer; color: var(--soft); font-size: 14px; }
details[open] > summary { margin-bottom: 10px; }
footer { margin-top: 48px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }

svg text { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .axis, svg .tick { font-size: 12px; fill: var(--soft); }
svg .small { font-size: 12px; }
svg .figure { font-weight: 600; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .base { stroke: var(--soft); stroke-width: 1; opacity: 0.6; }
svg .track { fill: var(--track); } svg .cell { fill: var(--c); }
svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: var(--c); }
svg .line.s0:not(:last-of-type) { opacity: 0.6; stroke-width: 1.3; }
svg .fill { fill: var(--c); }
svg .dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
svg text[class*=" s"].label.middle { fill: var(--c); font-size: 12px; font-weight: 600; }
svg .frontier { fill: none; stroke: var(--soft); stroke-width: 1.2; }
svg .cross { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linecap: round; }
svg .part { stroke: var(--card); stroke-width: 1; }
svg .interval { stroke: color-mix(in srgb, var(--c) 38%, var(--card)); stroke-width: 5; stroke-linecap: round; }
svg .interval.thin { stroke-width: 3; }
svg .link { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg .leader { stroke: var(--soft); stroke-width: 0.8; }
svg .sample { stroke: var(--ink); stroke-width: 1; opacity: 0.55; }
svg .expected { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
.ref { --c: var(--ref); } .s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
i.ref, i.s0, i.s1, i.s2, i.s3, i.s4, i.s5 { color: var(--c); }

@media (max-width: 1000px) { .beside { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 600px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 27px; }
  .lead { font-size: 18px; }
  section { margin-top: 34px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .tile { padding: 12px 13px; }
  .tile .value { font-size: 23px; }
  figure { padding: 13px 14px 15px; }
  th, td { padding: 8px 11px; }
  .pairs th { white-space: normal; width: 38%; padding-right: 12px; }
  .sortable tbody td.long:not(:first-child) { min-width: 18em; }
  .sortable { border-collapse: separate; border-spacing: 0; }
  .sortable tr > :first-child { position: sticky; left: 0; background: var(--card) padding-box; box-shadow: 1px 0 var(--line); }
  td:not(.right, .good, .bad, .unsure) { white-space: normal; overflow-wrap: anywhere; min-width: 7.5em; }
  .sortable td:first-child { min-width: 8.5em; max-width: 8.5em; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --track: #eee; --shade: #0000;
    --good: #14733b; --good-tint: #fff; --bad: #b3261e; --bad-tint: #fff; --ref: #8b94a3;
    --s0: #1f6feb; --s1: #d5610d; --s2: #1a8754; --s3: #8a4fd0; --s4: #c02f63; --s5: #0e7f94; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; }
  h1 { font-size: 24px; } h2 { font-size: 15px; } .lead { font-size: 14px; }
  .caption, .about, .words, .answer > h3, ul.notes, figcaption, details summary { font-size: 11px; }
  table { font-size: 9px; } thead th, .below { font-size: inherit; min-width: 0; }
  th, td { padding: 4px 5px; white-space: normal; } .below { white-space: nowrap; }
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
  .tile { padding: 8px 10px; } .tile .value { font-size: 18px; } .tile .name, .tile .n { font-size: 10px; }
  .figures { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; }
  .beside > figure { max-width: 420px; }
  figure { padding: 10px; }
  main { max-width: none; padding: 0; }
  section { margin-top: 20px; }
  figure, .tile, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  th button::after { content: none; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
