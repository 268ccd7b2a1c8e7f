# Shell functions shared by bootstrap and the scripts in tools/. Sourced with the repository as working directory.

say() { [ -t 2 ] && printf '\033[1m==> %s\033[0m\n' "$*" >&2 || printf '==> %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

known_kind() { # kind [kinds...]
	local k=$1 o
	shift
	[ $# -gt 0 ] || set -- release debug asan tsan clang
	for o; do [ "$k" = "$o" ] && return; done
	die "unknown kind '$k'; there are: $*"
}

# Run quietly; show the output only when the command fails.
quiet() {
	local log
	log=$(mktemp)
	if ! "$@" >"$log" 2>&1; then
		cat "$log" >&2
		rm -f "$log"
		die "failed: $*"
	fi
	rm -f "$log"
}

packages_for() { # purposes...
	local p
	for p in "$@"; do sed -n "s/^$p[[:space:]]\+//p" packages.txt; done
}

missing_packages() { # names...
	local p
	for p in "$@"; do
		[ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null | cut -c1-2)" = ii ] || echo "$p"
	done
}

# Apt as root, or through sudo when it needs no password.
as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"
	elif sudo -n true 2>/dev/null; then sudo "$@"
	else return 126
	fi
}

# As root; of what goes wrong (no network, a broken package) the line that says so.
apt_get() { # words...
	local log why
	log=$(mktemp)
	if ! as_root apt-get "$@" >"$log" 2>&1; then
		why=$(grep -m 1 '^E:' "$log" || tail -n 1 "$log")
		rm -f "$log"
		die "apt-get $1 failed: ${why#E: }"
	fi
	rm -f "$log"
}

need_packages() { # purposes...
	local missing
	command -v dpkg-query >/dev/null || {
		echo "bootstrap: this is no Debian system; install by hand what these Debian packages hold:" >&2
		packages_for "$@" | sed 's/^/  /' >&2
		for tool in gcc meson ninja pkg-config; do
			command -v $tool >/dev/null || die "missing: $tool (and possibly more of the list above)"
		done
		return 0
	}
	# shellcheck disable=SC2046
	missing=$(missing_packages $(packages_for "$@"))
	[ -z "$missing" ] && return 0
	say "installing: $(echo $missing)"
	export DEBIAN_FRONTEND=noninteractive
	as_root true || die "missing packages, and no root rights to install them; run as root: apt-get install $(echo $missing)"
	apt_get update -q
	# shellcheck disable=SC2086
	apt_get install -q -y --no-install-recommends $missing
}
