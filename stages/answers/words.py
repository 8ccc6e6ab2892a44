"""Word lists for the checks of answers. All words are in lower case."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Frequent words, of which almost each English sentence has some.
ENGLISH: Final = _words(
    """
    a an the and or of in on at to with for from by is are was be been being has have had it its
    this that there he she his her they their who which as not no but while over under also
    """
)
# Words of captions, which short ones without frequent words have.
CAPTION_WORDS: Final = _words(
    """
    face faces ear ears eye eyes nose mouth lips chin cheeks hair beard skin person people man
    woman boy girl child baby portrait photo image picture wearing smiling looking glasses hat
    shirt dress black white brown blue green red grey gray oval round long short small large open
    closed expression background visible head young old middle-aged
    """
)
# Frequent words of Spanish, French, German, Italian, Portuguese, Dutch and Swedish.
OTHER_LANGUAGES: Final = _words(
    """
    el la los las un una unos unas del con por para que es está son tiene lleva muestra su sus y
    le les des du une et est sont avec dans sur qui porte il elle ses sa au aux cette ce der die
    das den dem ein eine einer und ist sind mit auf im zeigt trägt sie er ihre seine haben lo gli
    uno di che è sono della dei delle nel mostra indossa suoi os um uma uns umas do da dos em com
    não são tem seus sua na no een het van en zijn haar met draagt och är med som har på av att
    ett
    """
)

# Capitalised words that are part of no person's name, in the following sets.
PLACES: Final = _words(
    """
    africa america american americas angeles antonio arizona asia atlanta austin australia
    barcelona beach beijing berlin boston brazil britain broadway brooklyn california canada
    canyon carolina chicago china city coast colorado dallas delhi denver detroit diego dubai east
    eastern egypt england europe florida france francisco germany gate greece harbor harlem hawaii
    hollywood hong houston india ireland island istanbul italy jamaica japan jersey kingdom kong
    korea lake las london madrid mahal manchester manhattan mexico miami michigan milan moscow
    mountain new nigeria north northern ocean ohio oregon pacific paris park philadelphia phoenix
    river rome russia san seattle south southern spain square states street sweden sydney texas
    times tokyo toronto tower turkey united university utah vegas venice vienna village washington
    west western york avenue bridge castle cathedral center centre church college hall high hotel
    institute museum palace plaza road school stadium station temple theater theatre valley zoo
    """
)
ORIGINS: Final = _words(
    """
    afro arab arabic asian african aboriginal british brazilian buddhist canadian caribbean
    caucasian catholic celtic chinese christian dutch egyptian english ethiopian european filipino
    french german greek gothic hawaiian hindu hispanic indian indigenous iranian irish islamic
    israeli italian jamaican japanese jewish kenyan korean latin latina latino latinx maori
    mediterranean mexican middle mongolian moroccan muslim native nepali nigerian nordic norwegian
    pakistani persian polish polynesian portuguese punjabi roman russian samoan scandinavian
    scottish sikh slavic somali spanish swedish swiss thai tibetan turkish ukrainian victorian
    edwardian vietnamese welsh
    """
)
INSTITUTIONS: Final = _words(
    """
    royal air force army navy marine marines corps guard police department fire rescue house court
    company inc ltd bank airlines airport hospital military academy society association foundation
    red cross unicef ministry council senate congress party union federation republic
    """
)
TIMES: Final = _words(
    """
    january february march april may june july august september october november december monday
    tuesday wednesday thursday friday saturday sunday spring summer autumn winter christmas easter
    halloween thanksgiving hanukkah ramadan diwali eve day night year new-year muertos valentine
    """
)
TEAMS: Final = _words(
    """
    lakers yankees sox bulls nets knicks warriors celtics cowboys patriots giants eagles dodgers
    mets cubs raiders packers steelers arsenal chelsea barcelona real bayern olympic olympics
    world cup league nba nfl fifa team club
    """
)
BRANDS: Final = _words(
    """
    nike adidas puma gucci prada chanel dior vuitton louis rolex levi levi's ray-ban apple iphone
    macbook google microsoft facebook instagram twitter youtube tiktok coca cola pepsi starbucks
    mcdonald's disney pixar marvel dc star wars trek mickey minnie mouse hello kitty pokemon santa
    claus stones zeppelin beatles metallica nirvana canon nikon sony leica harley davidson
    converse vans supreme calvin klein lauren hilfiger lacoste burberry zara wonder batman
    superman spider-man superhero captain pan mona lisa superwoman
    """
)
PARTS: Final = _words(
    """
    face facial ears ear eyes eye nose mouth lips lip hair skin chin cheek cheeks cheekbones
    eyebrows eyebrow brow forehead jaw jawline beard mustache moustache teeth neck complexion
    expression features feature shape color colour tone type style age gender sex clothing attire
    accessories background pose posture setting lighting mood overall appearance description
    details detail distinguishing other notable general physical body image photo picture person
    man woman male female girl boy adult young old middle-aged elderly smile smiling neutral
    slight slightly round oval square long short straight wavy curly dark light brown black blonde
    blond grey gray white red blue green hazel medium full thin thick small large wide narrow none
    visible yes no not likely approximately early late mid makeup make-up glasses eyewear jewelry
    hairstyle hands left right upper lower front side camera view
    """
)
OBJECTS: Final = _words(
    """
    t-shirt shirt tee jersey cap hat hoodie sweatshirt sweater jacket coat vest blazer suit tie
    dress skirt scarf uniform costume outfit apron kimono sari robe helmet beanie bandana headband
    snapback beret v-neck polo tweed jeans pants shoes sneakers boots socks gloves bag backpack
    purse watch ring necklace bracelet earrings chain hairpin glasses sunglasses goggles mask logo
    print poster sign banner flag badge patch sticker tattoo mural painting statue album band
    brand collar beard mustache moustache haircut hairdo cut bob braids bun style-cut
    costume-party party movie film series show comic cartoon book character doll toy mug cup
    bottle can guitar piano phone laptop computer car store shop cafe restaurant bar fan fans tour
    concert festival reference themed merchandise lanyard
    """
)
NO_PERSON: Final = frozenset().union(
    PLACES, ORIGINS, INSTITUTIONS, TIMES, TEAMS, BRANDS, PARTS, OBJECTS
)

# Words at the beginning of a sentence that have a capital only for that.
SENTENCE_STARTS: Final = _words(
    """
    a an the this that these those his her their its he she it they there here in on at with from
    of by for to and or but as if while when where both one two three some no not each another
    behind beside around below above under over near next overall additionally also moreover
    furthermore however despite although though notably meanwhile finally first second based
    """
)
# People without a name.
PERSON_NOUNS: Final = _words(
    """
    person man woman boy girl child baby toddler infant lady gentleman subject individual model
    guy people men women someone somebody everyone player athlete singer actor actress bride groom
    soldier performer today
    """
)
FACE_NOUNS: Final = _words(
    """
    face eyes ears nose mouth lips hair skin smile chin cheeks expression head eyebrows
    """
)
