"""British and American spellings of the same words, as word lists made of stems and endings."""

from __future__ import annotations

_OUR = (
    "arb|behavi|cand|clam|col|demean|discol|endeav|fav|ferv|flav|glam|harb|hon|hum|lab|misdemean|neighb|"
    "od|parl|ranc|rum|sav|savi|splend|succ|tum|val|vap|vig"
)
_OUR_ENDINGS = ",s,ed,ing,able,ably,ful,less,al,ally,ite,ites,er,ers,y,hood,hoods,ingly,fully"
_ISE = (
    "apolog|author|categor|central|character|civil|colon|critic|crystall|custom|digit|econom|emphas|equal|famil|familiar|final|formal|"
    "general|harmon|hospital|immun|initial|ideal|industrial|legal|local|material|maxim|memor|minim|mobil|modern|monopol|national|"
    "neutral|normal|optim|organ|penal|personal|polar|popular|priorit|privat|random|rational|real|recogn|reorgan|serial|social|special|"
    "stabil|standard|steril|summar|symbol|sympath|synchron|synthes|tokenis|util|victim|visual|vandal"
)
_ISE_ENDINGS = "e,es,ed,ing,er,ers,able,ation,ations,ational"
_DOUBLED = "cancel|channel|counsel|dial|equal|fuel|funnel|label|level|marvel|model|panel|pedal|refuel|relabel|remodel|shovel|signal|total|travel|tunnel"
_DOUBLED_ENDINGS = "ed,ing,er,ers"
_PAIRS = """
centre center|centres centers|centred centered|centring centering|fibre fiber|fibres fibers|litre liter|litres liters
theatre theater|theatres theaters|calibre caliber|sombre somber|lustre luster|spectre specter
analyse analyze|analysed analyzed|analysing analyzing|analyser analyzer|catalyse catalyze|catalysed catalyzed|paralyse paralyze|paralysed paralyzed
catalogue catalog|catalogues catalogs|catalogued cataloged|analogue analog|analogues analogs
defence defense|defences defenses|offence offense|offences offenses|pretence pretense
grey gray|greyscale grayscale|aluminium aluminum|ageing aging|artefact artifact|artefacts artifacts
fulfil fulfill|fulfils fulfills|fulfilment fulfillment|skilful skillful|enrol enroll|enrolment enrollment|instalment installment|instalments installments
jewellery jewelry|mould mold|moulds molds|plough plow|sceptic skeptic|sceptical skeptical|moustache mustache|manoeuvre maneuver|manoeuvres maneuvers
anaemia anemia|anaemic anemic|anaesthesia anesthesia|anaesthetic anesthetic|anaesthetics anesthetics|haemorrhage hemorrhage|haemoglobin hemoglobin
haemophilia hemophilia|leukaemia leukemia|oedema edema|oesophagus esophagus|oesophageal esophageal|oestrogen estrogen|foetus fetus|foetal fetal
paediatric pediatric|paediatrician pediatrician|orthopaedic orthopedic|gynaecology gynecology|diarrhoea diarrhea|coeliac celiac|tumour tumor
caesarean cesarean|haematology hematology|hypoglycaemia hypoglycemia|ischaemic ischemic|ischaemia ischemia|dyspnoea dyspnea|apnoea apnea
""".replace("\n", "|")


def british_to_american() -> dict[str, tuple[str, str]]:
    """British spelling -> (American spelling, family). The endings -ise and -ize are a family of their own: Oxford writes colour and organize."""
    pairs: dict[str, tuple[str, str]] = {}
    for stem in _OUR.split("|"):
        for ending in _OUR_ENDINGS.split(","):
            pairs[f"{stem}our{ending}"] = (f"{stem}or{ending}", "spelling")
    for stem in _ISE.split("|"):
        for ending in _ISE_ENDINGS.split(","):
            pairs[f"{stem}is{ending}"] = (f"{stem}iz{ending}", "-ise/-ize")
    for stem in _DOUBLED.split("|"):
        for ending in _DOUBLED_ENDINGS.split(","):
            pairs[f"{stem}l{ending}"] = (f"{stem}{ending}", "spelling")
    for pair in filter(None, _PAIRS.split("|")):
        british, american = pair.split()
        pairs[british] = (american, "spelling")
    return pairs
