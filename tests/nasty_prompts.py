"""Prompts that tokenizers take apart in different ways."""

from __future__ import annotations

PROMPTS = (
    "",
    "a red fox in the snow",
    "A Red FOX, in the Snow!",
    "don't, can't: f/1.8 (((masterpiece))) [x] #1 @me 100% $5 a_b-c",
    "we'll say they've 'quoted' it's I'M 'RE",
    "l'été déjà vu, naïve façade, señor, Ångström",
    "e\u0301 decomposed n\u0303, \u212bngstr\u00f6m sign, \ufb01gure",
    "İstanbul STRASSE ẞ ΣΊΣΥΦΟΣ ὈΔΥΣΣΕΎΣ",
    "雪の中の赤い狐、写真",
    "ثعلب أحمر في الثلج",
    "a 🦊 and 👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇦",
    "1234567890 ½ ² ٣ Ⅷ 3.14",
    "a red\nfox\r\nin\tthe\u00a0snow\u2028now\u3000here\x0bthere\x85end",
    "a\x00red\x07fox\x1b[31m\x7f\u200b\ufeff x\x1cy\u180ez",
    "wow! a fox!! !",
    "a red<|endoftext|>fox <|startoftext|> <|EndOfText|>!!",
    "a " * 75,
    "a " * 76,
    "a photo of a red fox standing in fresh snow at dawn, " * 12,
    "x" * 400,
    "https://example.org/?q=a+fox&n=1 <b>bold</b>",
    " \t \n ",
)
