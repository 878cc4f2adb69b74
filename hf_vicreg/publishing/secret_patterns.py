"""What secrets look like: one pattern a kind, and tests of what only looks like one.

The patterns are ours. A scanner kept for source code reads lines: it names no field of a JSON file, takes fingerprints
of images and weights for keys, and would be one more requirement for everybody who publishes.
"""

import base64
import binascii
import math
import re
from collections import Counter

PATTERNS = {
    "a Hub token": r"\b(hf|api_org)_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"\bgl(pat|dt|rt|cbt|ptt|ft|soat)-[\w-]{20,}",
    "an AWS key": r"\b(AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Google OAuth token": r"\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}|\b1//0[\w-]{30,}",
    "a Slack token": r"\bxox[a-z]-[A-Za-z0-9-]{10,}|\bxapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{16,}",
    "a webhook": r"hooks\.slack\.com/(services|workflows)/\w+/\w+|discord(app)?\.com/api/webhooks/\d+/[\w-]{20,}"
    r"|\.webhook\.office\.com/webhookb2/[\w@-]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a Stripe key": r"\b[rs]k_(live|test)_[A-Za-z0-9]{16,}|\bwhsec_[A-Za-z0-9+/=]{20,}",
    "a wandb key": r"\bwandb_v\d_[\w-]{20,}|\b(?i:wandb|weights.and.biases)\W{1,4}(\w+\W{1,4}){0,2}[0-9a-f]{40}\b",
    "a JSON web token": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
    "a Twilio key": r"\bSK[0-9a-f]{32}\b",
    "a SendGrid key": r"\bSG\.[\w-]{16,}\.[\w-]{16,}",
    "a Mailgun key": r"\bkey-[0-9a-f]{32}\b",
    "a Telegram token": r"\b\d{8,10}:AA[\w-]{33}\b",
    "an npm token": r"\bnpm_[A-Za-z0-9]{30,}",
    "a PyPI token": r"\bpypi-[\w-]{40,}",
    "a Docker token": r"\bdckr_(pat|oat)_[\w-]{20,}",
    "a DigitalOcean token": r"\bdo[opr]_v1_[0-9a-f]{40,}",
    "a Databricks token": r"\bdapi[0-9a-f]{32}\b",
    "an Azure key": r"\b(AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{20,}={0,2}|[?&]sig=[A-Za-z0-9%+/]{20,}",
    "a signed URL": r"[?&](X-Amz-(Signature|Security-Token|Credential)|X-Goog-Signature|Signature)=[\w%+/.-]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----|\bAGE-SECRET-KEY-1[A-Z0-9]{20,}|\bPuTTY-User-Key",
    "credentials in a URL": r"[a-z][a-z0-9+.-]*://[^\s/@:]*:[^\s/@]+@|[a-z][a-z0-9+.-]*://[^\s/@:]{16,}@",
    "a netrc login": r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+",
    "a bearer token": r"\b[Bb]earer\s+[\w.~+/-]{16,}",
    "a home folder": r"(/home/|/Users/|\b[A-Za-z]:\\+Users\\+)[^\s/\\\"']+",
}
KINDS = {kind: re.compile(pattern) for kind, pattern in PATTERNS.items()}
BASIC = re.compile(r"\bBasic\s+([A-Za-z0-9+/]{8,}={0,2})", re.IGNORECASE)
PASSWORD_NAME = r"(?:password|passwd|passphrase|pwd)"
SECRET_NAME = (
    r"(?:secret|token|credentials?|(?:api|access|account|auth|private|secret|session|wandb)[_-]?key|authori[sz]ation)"
)
ASSIGNED_PASSWORD = re.compile(rf"(?i:\b|_){PASSWORD_NAME}[\"']?\s*[:=]\s*[\"']?([^\s\"'&,;]{{6,}})", re.IGNORECASE)
ASSIGNED_SECRET = re.compile(rf"(?i:\b|_){SECRET_NAME}[\"']?\s*[:=]\s*[\"']?([^\s\"'&,;]{{12,}})", re.IGNORECASE)
ENDS_AS_PASSWORD = re.compile(rf"(^|.*[_.-]){PASSWORD_NAME}\d*", re.IGNORECASE)
ENDS_AS_SECRET = re.compile(rf"(^|.*[_.-]|.*[a-z](?=[A-Z])){SECRET_NAME}s?", re.IGNORECASE)
PLACEHOLDER = re.compile(
    r"<.*>|\$\{?\w+\}?|x{3,}|\*+|\.+|[\w.-]+\.safetensors|(none|null|true|false|your|changeme)\b.*", re.IGNORECASE
)
LEAST_ENTROPY = 3.0  # bits a character; twelve different letters have 3.6, words of prose below 3


def secret_in(text: str, *, assignments: bool = True) -> str | None:
    """Return what kind of secret a line of text holds, None if none is known.

    Args:
        text: The line.
        assignments: Look for `password=...` and `token: ...` too; not in code, whose variables have such names.
    """
    for kind, pattern in KINDS.items():
        if pattern.search(text):
            return kind
    if any(_is_basic(found) for found in BASIC.findall(text)):
        return "a basic authorization"
    if assignments:
        if any(not PLACEHOLDER.fullmatch(one) for one in ASSIGNED_PASSWORD.findall(text)):
            return "a password"
        if any(_is_random(one) for one in ASSIGNED_SECRET.findall(text)):
            return "a secret that is named as one"
    return None


def secret_under(name: str, text: str) -> str | None:
    """Return what kind of secret the text of a field holds, judged by the field's name."""
    if ENDS_AS_PASSWORD.fullmatch(name) and len(text) >= 4 and not PLACEHOLDER.fullmatch(text):
        return "a password"
    if ENDS_AS_SECRET.fullmatch(name) and len(text) >= 12 and _is_random(text):
        return "a secret that is named as one"
    return None


def _is_random(text: str) -> bool:
    """Return whether text is made of letters and digits without a pattern that a reader would see."""
    if PLACEHOLDER.fullmatch(text) or not re.search(r"\d", text) or not re.search(r"[A-Za-z]", text):
        return False
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares) >= LEAST_ENTROPY


def _is_basic(text: str) -> bool:
    """Return whether text is `user:password` in base64."""
    try:
        return b":" in base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
