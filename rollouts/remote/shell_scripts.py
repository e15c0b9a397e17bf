"""The completion of bash and zsh. typer's own for bash takes `RUN:` and `FIELD=` for words of their own; that for zsh
puts a space after them, and does nothing at a shell's first Tab."""

# In the words of typer's scripts. It asks as fish does: by the line up to the cursor. bash ends a word at ":" and "=":
# what stands before them is taken off what is offered, since bash leaves it on the line.
BASH = r"""
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} head value
    head=${line%%"$2"}
    head=${head##*[[:space:]]}
    COMPREPLY=()
    while IFS= read -r value; do
        value=${value%%%%$'\t'*}
        [[ -n $value ]] || continue
        value=${value#"$head"}
        if [[ $head != [\"\']* && $value == *[!A-Za-z0-9_.,:=/@+-]* ]]; then
            printf -v value %%q "$value"
        fi
        COMPREPLY+=("$value")
    done < <(env %(autocomplete_var)s=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
                 _TYPER_COMPLETE_ARGS="$line" "$1" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:=/] ]]; then
        compopt -o nospace
    fi
}

complete -o default -F %(complete_func)s %(prog_name)s
"""

# The file is autoloaded by the first Tab, as a function of its own name, which then has to complete as well.
ZSH = r"""
#compdef %(prog_name)s

%(complete_func)s() {
    local line value
    local -a whole begun
    for line in "${(@f)$(env %(autocomplete_var)s=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
                         _TYPER_COMPLETE_ARGS="$LBUFFER" %(prog_name)s 2>/dev/null)}"; do
        value=${line%%%%$'\t'*}
        [[ -n $value ]] || continue
        line=${value//:/\\:}${${line#"$value"}/$'\t'/:}
        if [[ $value == *[:=/] ]]; then begun+=("$line"); else whole+=("$line"); fi
    done
    (( $#whole + $#begun )) || { _files; return }
    [[ $PREFIX == --*=* ]] && compset -P '--*='
    (( $#whole )) && _describe '%(prog_name)s' whole
    (( $#begun )) && _describe '%(prog_name)s' begun -S ''
}

compdef %(complete_func)s %(prog_name)s
if [[ $funcstack[1] == _%(prog_name)s ]]; then %(complete_func)s "$@"; fi
"""
